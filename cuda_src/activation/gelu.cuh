#pragma once
#include "common/types.cuh"

// x (1 + erf(x / sqrt 2)) / 2, by erfc: 1 + erf cancels for negative x.
PYINFER_DEVICE float activation(float x) {
    return 0.5f * x * erfcf(-0.70710678118654752f * x);
}
