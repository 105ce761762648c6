"""``shoal bench gpu``: one command that checks, tunes and measures the GPU backend."""
