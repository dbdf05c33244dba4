#include "detail/fallback.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "detail/check.h"
#include "detail/tall_skinny.h"

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

void AdamW::follow(size_t index) {  // the model may have been moved
  const at::Tensor& param = params_[index];
  for (at::Tensor* state : {&exp_avg_[index], &exp_avg_sq_[index]}) {
    if (state->device() != param.device() || state->scalar_type() != param.scalar_type()) {
      *state = state->to(param.options().requires_grad(false));
    }
  }
  steps_[index] = steps_[index].to(param.device());
}

namespace {

// What goes to the fused kernel with one learning rate.
struct Lists {
  std::vector<at::Tensor> params, grads, exp_avg, exp_avg_sq, steps;
};

void fused_step(Lists& own,
                const at::Tensor& lr,  // (); undefined: the settings'
                const GroupSettings& settings,
                bool maximize,
                const at::Tensor& found_inf) {
  const auto run = [&](const auto& rate) {
    at::_fused_adamw_(own.params, own.grads, own.exp_avg, own.exp_avg_sq, /*max_exp_avg_sqs=*/{},
                      own.steps, rate, settings.beta1, settings.beta2, settings.weight_decay,
                      settings.eps, /*amsgrad=*/false, maximize, /*grad_scale=*/std::nullopt,
                      found_inf);
  };
  lr.defined() ? run(lr) : run(settings.lr);
}

}  // namespace

at::Tensor AdamW::raw_direction(size_t index, const GroupSettings& settings) {
  if (!params_[index].grad().defined()) {
    return {};
  }
  follow(index);
  const at::Tensor grad = some_rows(params_[index].grad().detach());
  const at::Tensor g = grad.to(at::promoteTypes(grad.scalar_type(), at::kFloat));
  const at::Tensor old = some_rows(exp_avg_sq_[index]).to(g.scalar_type());
  const at::Tensor weight = 1 - at::pow(settings.beta2, (steps_[index] + 1).to(at::kDouble));
  const at::Tensor square = (settings.beta2 * old + (1 - settings.beta2) * g * g) / weight;
  return g / (square.sqrt() + settings.eps);
}

void AdamW::step(const GroupSettings& settings,
                 bool maximize,
                 const HeadMeter& meter,
                 double head_step) {
  std::map<int64_t, Lists> by_head;  // -1: what is none
  std::vector<at::Tensor> finite;
  for (size_t i = 0; i < params_.size(); ++i) {
    const at::Tensor& grad = params_[i].grad();
    if (!grad.defined()) {
      continue;
    }
    CTRLORA_CHECK(grad.layout() == at::kStrided, "ctrlora::Engine::step",
                  "expected dense gradients; got ", grad.layout(), " of shape ", grad.sizes(),
                  ". Remedy: build the embedding with sparse=False.");
    follow(i);
    const auto head = heads.find(i);
    Lists& own = by_head[head == heads.end() || head_step == 0.0 ? -1 : head->second];
    own.params.push_back(params_[i].detach());
    own.grads.push_back(
        grad.scalar_type() == params_[i].scalar_type() ? grad : grad.to(params_[i].scalar_type()));
    own.exp_avg.push_back(exp_avg_[i]);
    own.exp_avg_sq.push_back(exp_avg_sq_[i]);
    own.steps.push_back(steps_[i]);
    // A gradient whose square overflows would stop its parameter for good.
    const at::Tensor largest = grad.abs().amax();
    finite.push_back(largest.to(at::promoteTypes(grad.scalar_type(), at::kFloat))
                         .square()
                         .isfinite()
                         .to(params_.front().device()));
  }
  if (finite.empty()) {
    return;
  }
  const at::Tensor found = at::stack(finite).all().logical_not();
  const at::Tensor found_inf = found.to(at::kFloat);
  for (auto& [head, own] : by_head) {
    at::Tensor lr;
    if (head >= 0) {  // CUDA's kernel reads it as float
      const at::Tensor& param = own.params.front();
      const auto options = param.options().dtype(param.is_cuda() ? at::kFloat : at::kDouble);
      lr = (settings.lr * meter.gains(head_step).select(0, head)).to(options);
    }
    for (at::Tensor& count : own.steps) {
      count.add_(1.0);
    }
    fused_step(own, lr, settings, maximize, found_inf);
    for (at::Tensor& count : own.steps) {
      count.sub_(found_inf.to(count.device()));
    }
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
