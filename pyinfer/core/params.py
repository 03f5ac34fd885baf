"""One declaration of a kernel's parameter struct: it renders the C++ and packs the bytes, so host and device cannot disagree."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

# kind -> (struct code, size and alignment, default C++ type)
_KINDS = {
    "ptr": ("P", 8, "const void"),
    "i32": ("i", 4, "int32_t"),
    "u32": ("I", 4, "uint32_t"),
    "i64": ("q", 8, "int64_t"),
    "u64": ("Q", 8, "uint64_t"),
    "f32": ("f", 4, "float"),
    "tensor_map": ("128s", 8, "TensorMap"),  # aligned to 64 bytes: checked below
}


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its name, kind (ptr, i32, u32, i64, u64, f32), C++ pointee type of a pointer, and a comment with shape or unit."""

    name: str
    kind: str
    ctype: str = ""
    doc: str = ""
    count: int = 0  # > 0: an array of that many

    @property
    def code(self) -> str:
        """Its `struct` format. An array is packed from its bytes."""
        code, size, _ = _KINDS[self.kind]
        return f"{self.count * size}s" if self.count else code


def ptr(name: str, ctype: str = "const void", doc: str = "") -> Field:
    """A pointer field; `ctype` is what it points to ("const scalar_t")."""
    return Field(name, "ptr", ctype, doc)


def i32(name: str, doc: str = "") -> Field:
    """A 32-bit signed integer field."""
    return Field(name, "i32", doc=doc)


def u32(name: str, doc: str = "") -> Field:
    """A 32-bit unsigned integer field."""
    return Field(name, "u32", doc=doc)


def i64(name: str, doc: str = "") -> Field:
    """A 64-bit signed integer field (strides, offsets)."""
    return Field(name, "i64", doc=doc)


def u64(name: str, doc: str = "") -> Field:
    """A 64-bit unsigned integer field (seeds)."""
    return Field(name, "u64", doc=doc)


def f32(name: str, doc: str = "") -> Field:
    """A 32-bit floating-point field."""
    return Field(name, "f32", doc=doc)


def u64_array(name: str, count: int, doc: str = "") -> Field:
    """`count` uint64 values, given as bytes (`numpy.ndarray.tobytes()`). Only arrays and 8-byte fields stand before an array."""
    return Field(name, "u64", doc=doc, count=count)


def tensor_map(name: str, doc: str = "") -> Field:
    """A TMA descriptor by value (`core.tensormap.encode`), given as bytes. It must lie at a multiple of 64 bytes, behind arrays and 8-byte fields."""
    return Field(name, "tensor_map", doc=doc)


@dataclass(frozen=True)
class ParamStruct:
    """The parameter struct of one kernel.

    Every kernel takes `const __grid_constant__ Params p`; `{{ params }}` in a template is this struct's C++ source.
    """

    name: str
    fields: tuple[Field, ...]
    packer: struct.Struct = field(init=False, repr=False, compare=False)
    size: int = field(init=False, compare=False)
    alignment: int = field(init=False, repr=False, compare=False)

    def __init__(self, name: str, *fields: Field) -> None:
        names = [f.name for f in fields]
        duplicate = next((n for n in names if names.count(n) > 1), None)
        if duplicate:
            raise ValueError(f"ParamStruct {name}: field {duplicate} is declared twice")
        if not fields:  # C++ gives an empty struct a size, struct.Struct does not
            raise ValueError(f"ParamStruct {name}: there are no fields, wanted at least one")
        maps = [i for i, f in enumerate(fields) if f.kind == "tensor_map"]
        last_array = max((i for i, f in enumerate(fields) if f.count or i in maps), default=0)
        if any(_KINDS[f.kind][1] != 8 for f in fields[:last_array]):
            raise ValueError(
                f"ParamStruct {name}: arrays must come first or behind 8-byte fields, where `struct` aligns them as C++ does"
            )
        for i in maps:
            if struct.calcsize("@" + "".join(f.code for f in fields[:i])) % 64:
                raise ValueError(
                    f"ParamStruct {name}: tensor map {fields[i].name} does not lie at a multiple of 64 bytes"
                )
        alignment = 64 if maps else 8
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "alignment", alignment)
        object.__setattr__(self, "fields", tuple(fields))
        # '@' aligns as the C++ compiler does; the trailing 0P rounds the size up to 8.
        layout = "@" + "".join(f.code for f in fields) + "0P"
        packer = struct.Struct(f"{layout}{-struct.calcsize(layout) % alignment}x")
        object.__setattr__(self, "packer", packer)
        object.__setattr__(self, "size", packer.size)

    def __reduce__(self) -> tuple[Any, ...]:  # struct.Struct cannot be pickled
        return (ParamStruct, (self.name, *self.fields))

    def pack(self, *values: Any) -> bytes:
        """The struct's bytes, values in field order."""
        return self.packer.pack(*values)

    def cpp_source(self) -> str:
        """The C++ struct `Params`, with a static_assert of the size the host packs."""
        lines = [f"struct alignas({self.alignment}) Params {{"]
        for f in self.fields:
            declaration = (
                f"{f.ctype}* {f.name};"
                if f.kind == "ptr"
                else f"{_KINDS[f.kind][2]} {f.name}{f'[{f.count}]' if f.count else ''};"
            )
            lines.append(f"    {declaration:<44}// {f.doc}" if f.doc else f"    {declaration}")
        lines += ["};", f'static_assert(sizeof(Params) == {self.size}, "host and device disagree about {self.name}");']
        return "\n".join(lines)
