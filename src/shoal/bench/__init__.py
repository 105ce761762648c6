"""Benchmarks: throughput and latency as vLLM measures them, and llama.cpp side by side on the same file (docs/benchmarks.md)."""
