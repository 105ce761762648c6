"""The arithmetic: one Backend protocol and its implementations."""
