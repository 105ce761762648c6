"""GGUF files: what lies in them (reader) and how their numbers are stored (quants)."""
