"""``shoal bench serve`` and ``shoal bench soak``: load on a server of the OpenAI API, as ``vllm bench serve`` makes it."""
