"""The CPU backend: kernels in Numba, run by a pool of our own."""
