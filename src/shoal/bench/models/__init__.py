"""Model files for benchmarks: random ones, and others quantised anew."""
