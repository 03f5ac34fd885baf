"""CUDA source of every kernel: Jinja templates, and the headers they include.

A package only so that `importlib.resources.files("pyinfer.cuda_src")` finds the files in a wheel and in an editable install alike.
"""
