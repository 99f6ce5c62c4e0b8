"""Peers side by side: `python -m benchmarks step`, `scaling`, `kernels`. README.md says how to read them."""
