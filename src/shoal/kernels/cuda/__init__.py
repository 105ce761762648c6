"""The Backend in Triton, for GPUs."""
