"""``shoal bench scale``: how many workers one driver of a job on a cluster keeps busy."""
