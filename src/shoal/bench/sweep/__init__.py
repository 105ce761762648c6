"""``shoal bench sweep``: speed over numbers of sequences and lengths of prompts."""
