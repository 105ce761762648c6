"""``shoal bench startup``: from nothing to the first token."""
