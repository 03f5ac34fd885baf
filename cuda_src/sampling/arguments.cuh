// Arguments that are one value for all or a tensor of one value a row or an output.
#pragma once

#include "common/types.cuh"

enum Spread : int32_t { ONE_FOR_ALL = 0, PER_OUTPUT = 1, PER_ROW = 2 };

PYINFER_DEVICE int64_t spread_index(int32_t spread, int64_t output, int64_t row) {
    return spread == PER_OUTPUT ? output : spread == PER_ROW ? row : 0;
}

// values: int32 or, if `wide`, int64; null: `value`.
PYINFER_DEVICE int64_t load_int(const void* values, int32_t wide, int64_t index, int64_t value) {
    if (values == nullptr) {
        return value;
    }
    return wide ? static_cast<const int64_t*>(values)[index] : static_cast<const int32_t*>(values)[index];
}

PYINFER_DEVICE float load_float(const float* values, int64_t index, float value) {
    return values == nullptr ? value : values[index];
}
