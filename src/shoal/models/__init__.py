"""Which networks there are and how their weights go together."""
