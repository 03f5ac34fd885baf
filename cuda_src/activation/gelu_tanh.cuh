#pragma once
#include "common/ptx_math.cuh"

// x (1 + tanh(u)) / 2 = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3): no tanh, and no cancellation for negative x.
PYINFER_DEVICE float activation(float x) {
    const float u = 0.79788456080286536f * x * (1.0f + 0.044715f * x * x);
    return x * rcp_approx(1.0f + exp2_approx(-2.0f * LOG2_E * u));
}
