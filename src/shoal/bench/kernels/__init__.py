"""``shoal bench kernels``: single operations beside what the machine allows."""
