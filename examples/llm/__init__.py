"""A small Llama-family runner: continuous batching over a paged KV cache, on pyinfer's public API only.

Run it with ``python -m examples.llm``; README.md beside this file says how it maps to the operators.
"""
