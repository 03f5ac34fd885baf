"""Benchmarks: `python -m benchmarks SUITE … [--peers flashinfer fa3 torch torch-compile triton] [--out FILE.json]`."""
