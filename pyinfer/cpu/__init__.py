"""The Numba backend, one module per operator family. Modules here may import numba: they are themselves imported lazily."""
