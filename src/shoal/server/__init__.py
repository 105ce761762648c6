"""The server: an engine behind OpenAI's API."""
