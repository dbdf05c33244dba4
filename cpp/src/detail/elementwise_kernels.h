// float32 passes over a gradient, for the instruction set at hand: our other code is built for any
// CPU.
#pragma once

#include <cstdint>

namespace ctrlora::detail {

/// momentum <- momentum + step (grad - momentum).
void lerp_kernel(float* momentum, const float* grad, int64_t count, float step);

/// Sum of squares.
double squares_kernel(const float* values, int64_t count);

}  // namespace ctrlora::detail
