"""Anthropic's wire format: its bodies as bodies of OpenAI's chats, and answers in its form."""
