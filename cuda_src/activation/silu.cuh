#pragma once
#include "common/ptx_math.cuh"

// x / (1 + e^-x)
PYINFER_DEVICE float activation(float x) {
    return x * rcp_approx(1.0f + exp2_approx(-LOG2_E * x));
}
