// Counter-based random numbers: the same (seed, stream) gives the same numbers on any machine.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace ctrlora::detail {

/// `count` numbers uniform in [0, 1).
std::vector<double> philox_uniform(uint64_t seed, uint64_t stream, int64_t count);

/// Standard normal tensor of the given sizes.
at::Tensor philox_normal(uint64_t seed,
                         uint64_t stream,
                         at::IntArrayRef sizes,
                         const at::TensorOptions& options);

}  // namespace ctrlora::detail
