// Writing a float row beside a row that is read: by 16 bytes where both have the same alignment.
#pragma once

#include "sampling/row.cuh"

// out[id] = f(x) for every element x of the row. All threads of the block call it.
template <typename T, typename F>
PYINFER_DEVICE void map_row(const Row<T>& row, float* out, T fill, F&& f) {
    constexpr int VEC = Row<T>::VEC;
    float* const shifted = out - row.begin;  // element e of vector j goes to shifted[j * VEC + e]
    const bool aligned = (reinterpret_cast<uint64_t>(shifted) & 15u) == 0;
    for (int j = threadIdx.x; j < row.num_vecs; j += BLOCK) {
        const typename Row<T>::Vec v = row.load(j, fill);
        const int first = j * VEC;
        if (aligned && first >= row.begin && first + VEC <= row.end) {
#pragma unroll
            for (int part = 0; part < VEC; part += 4) {
                vec_t<float, 4> y;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    y[e] = f(v[part + e]);
                }
                y.store(shifted + first + part);
            }
        } else {
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                const float y = f(v[e]);
                if (first + e >= row.begin && first + e < row.end) {
                    shifted[first + e] = y;
                }
            }
        }
    }
}
