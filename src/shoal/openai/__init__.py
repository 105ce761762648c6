"""OpenAI's wire format, for batch files and for the server: bodies as types, and the way from a body to a request."""
