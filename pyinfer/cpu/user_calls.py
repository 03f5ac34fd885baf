"""How the attention kernels call a user's functions: by address, a row at a time, so that no kernel is compiled once more for a variant.

`user` is an int64 array: addresses of the four row functions (0: none), the address of the parameters' cells, and whether there is no softmax.
A row function is `void f(float *row, int64 begin, int64 end, int64 *place, int64 *params, float before, float after)` and works on row[begin..end), in place.
`place` is int64: request, query token, key of column 0, query head, kv head, queries and keys of the request.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LOGITS, MASK, QUERY, OUTPUT, PARAMS, LINEAR = range(6)


@intrinsic
def call_row(typingctx, function, row, at, begin, end, place, params, before, after):
    """Call the row function at an address: `row` from element `at` on, columns begin..end; `before` and `after` are its last two arguments."""
    i64, u64, f32 = types.int64, types.uint64, types.float32
    signature = types.void(i64, row, u64, u64, u64, place, i64, f32, f32)

    def codegen(context, builder, signature, values):
        function, row, at, begin, end, place, params, before, after = values
        word, single = ir.IntType(64), ir.FloatType()
        array = context.make_array(signature.args[1])(context, builder, row)
        data = cgutils.gep_inbounds(builder, array.data, at)
        cells = context.make_array(signature.args[5])(context, builder, place).data
        kind = ir.FunctionType(
            ir.VoidType(), [single.as_pointer(), word, word, word.as_pointer(), word, single, single]
        )
        pointer = builder.inttoptr(function, kind.as_pointer())
        builder.call(pointer, [data, begin, end, cells, params, before, after])
        return context.get_dummy_value()

    return signature, codegen
