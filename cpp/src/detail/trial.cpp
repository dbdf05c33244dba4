#include "detail/trial.h"

#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "detail/tensor_math.h"

namespace ctrlora::detail {

Trial::Trial(std::vector<at::Tensor> params,
             const std::vector<std::pair<std::string, at::Tensor>>& state)
    : params_(std::move(params)) {
  const NumericsGuard guard;
  before_.reserve(params_.size());
  for (const at::Tensor& param : params_) {
    before_.push_back(param.detach().clone());
  }
  for (const auto& [name, tensor] : state) {
    state_[name] = tensor.clone();
  }
  const at::TensorOptions options = params_.empty() ? at::TensorOptions() : before_[0].options();
  decrease_ = at::zeros({1}, options.dtype(at::kDouble));
}

void Trial::add_decrease(size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    const at::Tensor grad = params_[i].grad();
    if (grad.defined()) {
      const at::Tensor moved = params_[i].detach().to(at::kDouble) - before_[i].to(at::kDouble);
      // A layer whose gradient is not finite stood still.
      const at::Tensor slope =
          at::where(moved == 0, at::zeros_like(moved), grad.to(at::kDouble) * moved);
      decrease_ = decrease_ - slope.sum().to(decrease_.device());
    }
  }
}

void Trial::restore_parameters() const {
  for (size_t i = 0; i < params_.size(); ++i) {
    params_[i].detach().copy_(before_[i]);
  }
}

}  // namespace ctrlora::detail
