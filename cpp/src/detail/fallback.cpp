#include "detail/fallback.h"

#include <ATen/ops/_foreach_sub.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "detail/check.h"

namespace ctrlora::detail {

AdamW::AdamW(std::vector<at::Tensor> params, int64_t group)
    : params_(std::move(params)), group_(group) {
  for (const at::Tensor& param : params_) {
    exp_avg_.push_back(at::zeros_like(param));
    exp_avg_sq_.push_back(at::zeros_like(param));
    steps_.push_back(at::zeros({}, param.options().dtype(at::kFloat).requires_grad(false)));
  }
  skipped = at::zeros({1}, at::TensorOptions().dtype(at::kLong));
  if (!params_.empty()) {
    skipped = skipped.to(params_.front().device());
  }
}

void AdamW::step(const GroupSettings& settings, bool maximize) {
  std::vector<at::Tensor> params, grads, exp_avg, exp_avg_sq, steps, finite;
  for (size_t i = 0; i < params_.size(); ++i) {
    const at::Tensor& grad = params_[i].grad();
    if (!grad.defined()) {
      continue;
    }
    CTRLORA_CHECK(grad.layout() == at::kStrided, "ctrlora::Engine::step",
                  "expected dense gradients; got ", grad.layout(), " of shape ", grad.sizes(),
                  ". Remedy: build the embedding with sparse=False.");
    for (at::Tensor* state : {&exp_avg_[i], &exp_avg_sq_[i]}) {  // the model may have been moved
      if (state->device() != params_[i].device() ||
          state->scalar_type() != params_[i].scalar_type()) {
        *state = state->to(params_[i].options().requires_grad(false));
      }
    }
    steps_[i] = steps_[i].to(params_[i].device());
    params.push_back(params_[i].detach());
    grads.push_back(
        grad.scalar_type() == params_[i].scalar_type() ? grad : grad.to(params_[i].scalar_type()));
    exp_avg.push_back(exp_avg_[i]);
    exp_avg_sq.push_back(exp_avg_sq_[i]);
    steps.push_back(steps_[i]);
    // A gradient whose square overflows would stop its parameter for good.
    const at::Tensor largest = grad.abs().amax();
    finite.push_back(largest.to(at::promoteTypes(grad.scalar_type(), at::kFloat))
                         .square()
                         .isfinite()
                         .to(params_.front().device()));
  }
  if (params.empty()) {
    return;
  }
  const at::Tensor found = at::stack(finite).all().logical_not();
  const at::Tensor found_inf = found.to(at::kFloat);
  for (at::Tensor& count : steps) {
    count.add_(1.0);
  }
  at::_fused_adamw_(params, grads, exp_avg, exp_avg_sq, /*max_exp_avg_sqs=*/{}, steps, settings.lr,
                    settings.beta1, settings.beta2, settings.weight_decay, settings.eps,
                    /*amsgrad=*/false, maximize, /*grad_scale=*/std::nullopt, found_inf);
  for (at::Tensor& count : steps) {
    count.sub_(found_inf.to(count.device()));
  }
  skipped = skipped.to(found.device());
  skipped.add_(found);
}

std::vector<std::pair<std::string, at::Tensor>> AdamW::named_tensors() const {
  std::vector<std::pair<std::string, at::Tensor>> out;
  for (size_t i = 0; i < params_.size(); ++i) {
    const std::string prefix = std::to_string(i) + ".";
    out.emplace_back(prefix + "exp_avg", exp_avg_[i]);
    out.emplace_back(prefix + "exp_avg_sq", exp_avg_sq_[i]);
    out.emplace_back(prefix + "step", steps_[i]);
  }
  out.emplace_back("skipped", skipped);
  return out;
}

}  // namespace ctrlora::detail
