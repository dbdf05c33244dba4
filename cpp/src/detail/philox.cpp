#include "detail/philox.h"

#include <ATen/core/PhiloxRNGEngine.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <numbers>

namespace ctrlora::detail {

std::vector<double> philox_uniform(uint64_t seed, uint64_t stream, int64_t count) {
  at::philox_engine engine(seed, stream, 0);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) {
    value = static_cast<double>(engine()) * 0x1p-32;
  }
  return values;
}

at::Tensor philox_normal(uint64_t seed,
                         uint64_t stream,
                         at::IntArrayRef sizes,
                         const at::TensorOptions& options) {
  at::Tensor normal = at::empty(sizes, at::TensorOptions().dtype(at::kDouble));
  const int64_t count = normal.numel();
  const std::vector<double> uniform = philox_uniform(seed, stream, count + (count & 1));
  auto* out = normal.data_ptr<double>();
  for (int64_t i = 0; i < count; ++i) {  // Box-Muller, one pair at a time
    const auto pair = static_cast<size_t>(i & ~int64_t{1});
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform[pair]));
    const double angle = 2.0 * std::numbers::pi * uniform[pair + 1];
    out[i] = radius * ((i & 1) != 0 ? std::sin(angle) : std::cos(angle));
  }
  return normal.to(options);
}

}  // namespace ctrlora::detail
