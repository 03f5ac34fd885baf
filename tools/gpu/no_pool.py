"""pytest plugin for sanitizer.sh: every CuPy array gets an allocation of its own.

CuPy's pool hands out pieces of larger blocks; an access past an array would stay inside its block, and memcheck would not see it.
"""

from __future__ import annotations

import cupy

cupy.cuda.set_allocator(None)
cupy.cuda.set_pinned_memory_allocator(None)
