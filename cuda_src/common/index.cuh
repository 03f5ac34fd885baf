// Index arrays of either width: callers pass int32 or int64 tensors, one kernel reads both.
#pragma once
#include "common/types.cuh"

// indices[i]; `wide` says that they are int64. The branch is uniform.
PYINFER_DEVICE int64_t load_index(const void* indices, int64_t i, bool wide) {
    return wide ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
}
