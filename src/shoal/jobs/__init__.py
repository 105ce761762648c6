"""Jobs: a file of requests (OpenAI Batch format) worked through into a file of results."""
