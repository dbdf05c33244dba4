#include "ctrlora/processes.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>

#include <algorithm>

#include "detail/check.h"

namespace ctrlora {

void Processes::validate() const {
  CTRLORA_CHECK(count >= 1 && rank >= 0 && rank < count, "ctrlora::Processes", "rank = ", rank,
                ", count = ", count, ". Violated constraint: 0 <= rank < count.");
  CTRLORA_CHECK(all_reduce != nullptr, "ctrlora::Processes",
                "expected a function all_reduce; got none. Remedy: one that calls the group's.");
}

at::ScalarType Processes::sent_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat ? at::kBFloat16 : dtype;
}

int64_t Processes::exchange_every(const Traffic& traffic) {
  constexpr int64_t kShare = 24;
  const int64_t gradients = std::max<int64_t>(1, traffic.gradients);
  const int64_t left = std::max(gradients - kShare * traffic.ranks, (gradients + 1) / 2);
  return std::max<int64_t>(1, (kShare * traffic.sketches + left - 1) / left);
}

CurvatureSketch Processes::sum(const CurvatureSketch& own, bool mean_loss) const {
  const at::Tensor flat = at::cat({own.input.product.flatten(), own.output.product.flatten()});
  const at::ScalarType dtype = flat.scalar_type();
  const at::Tensor sent = flat.to(sent_dtype(dtype)).contiguous();
  const at::Tensor claims = own.from_gradient.logical_not().to(at::kDouble);
  const at::Tensor numbers = at::stack({own.input.trace, own.input.weight, own.output.trace,
                                        own.output.weight, own.base_square, own.sequences, claims});
  all_reduce({sent, numbers});
  const at::Tensor products = sent.to(dtype);

  const double square = mean_loss ? 1.0 / static_cast<double>(count * count) : 1.0;
  const int64_t split = own.input.product.numel();
  CurvatureSketch out;
  out.input = {products.slice(0, 0, split).view(own.input.product.sizes()), numbers[0], numbers[1],
               /*disposable=*/true};
  out.output = {products.slice(0, split).view(own.output.product.sizes()) * square,
                numbers[2] * square, numbers[3], /*disposable=*/true};
  out.base_square = numbers[4];
  out.sequences = numbers[5];
  out.from_gradient = numbers[6] == 0;
  return out;
}

}  // namespace ctrlora
