#include "ctrlora/hutchinson.h"

#include <ATen/ops/tensor.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "detail/check.h"
#include "detail/philox.h"
#include "detail/tensor_math.h"

namespace ctrlora {

namespace {

constexpr const char* kWhere = "ctrlora::HutchinsonProbe";

double rounding_of(const std::vector<at::Tensor>& params) {
  const bool wide = std::all_of(params.begin(), params.end(),
                                [](const at::Tensor& p) { return p.scalar_type() == at::kDouble; });
  const bool narrow = std::any_of(params.begin(), params.end(),
                                  [](const at::Tensor& p) { return p.element_size() < 4; });
  return wide ? 1.1e-16 : narrow ? 4e-3 : 6e-8;
}

}  // namespace

HutchinsonProbe::HutchinsonProbe(const std::vector<LoraPair>& pairs,
                                 uint64_t seed,
                                 uint64_t stream) {
  const detail::NumericsGuard guard;
  double square = 0.0;
  double count = 0.0;
  for (const LoraPair& pair : pairs) {
    for (const at::Tensor& param : {pair.a, pair.b}) {
      const at::Tensor normal = detail::philox_normal(seed, (stream << 20U) + params_.size(),
                                                      param.sizes(), at::TensorOptions(at::kFloat));
      directions_.push_back((normal >= 0).to(param.options()) * 2 - 1);
      params_.push_back(param);
      before_.push_back(param.detach().clone());
      grads_.push_back(param.grad());
      square += param.detach().to(at::kDouble).square().sum().item<double>();
      count += static_cast<double>(param.numel());
    }
  }
  sums_.resize(params_.size());
  const double size = std::sqrt(square / std::max(count, 1.0));
  step_ = std::cbrt(rounding_of(params_)) * std::max(size, 1e-3);
}

HutchinsonProbe::~HutchinsonProbe() {
  restore();
}

void HutchinsonProbe::shift(int64_t sign) {
  CTRLORA_CHECK(sign == 1 || sign == -1, kWhere, "expected sign 1 or -1; got ", sign, ".");
  const detail::NumericsGuard guard;
  sign_ = sign;
  for (size_t i = 0; i < params_.size(); ++i) {
    params_[i].detach().copy_(before_[i] + directions_[i] * (step_ * static_cast<double>(sign)));
    params_[i].mutable_grad() = at::Tensor();
  }
}

void HutchinsonProbe::take() {
  CTRLORA_CHECK(sign_ != 0, kWhere, "expected shift() before take(); got none.");
  const detail::NumericsGuard guard;
  for (size_t i = 0; i < params_.size(); ++i) {
    const at::Tensor grad = params_[i].grad();
    if (grad.defined()) {
      const at::Tensor slope = (grad.to(at::kDouble) * directions_[i].to(at::kDouble)).sum() *
                               (static_cast<double>(sign_) / (2 * step_));
      sums_[i] = sums_[i].defined() ? sums_[i] + slope : slope;
    }
  }
  sign_ = 0;
}

void HutchinsonProbe::differentiate(const at::Tensor& loss) {
  const std::vector<at::Tensor> grads = torch::autograd::grad(
      {loss}, params_, {}, /*retain_graph=*/true, /*create_graph=*/true, /*allow_unused=*/true);
  std::vector<at::Tensor> outputs, weights;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (grads[i].defined() && grads[i].requires_grad()) {
      outputs.push_back(grads[i]);
      weights.push_back(directions_[i]);
    }
  }
  CTRLORA_CHECK(!outputs.empty(), kWhere, "expected a loss that can be differentiated twice; got ",
                "gradients without a graph. Remedy: shift() and take().");
  const std::vector<at::Tensor> products =
      torch::autograd::grad(outputs, params_, weights, /*retain_graph=*/false,
                            /*create_graph=*/false, /*allow_unused=*/true);
  for (size_t i = 0; i < products.size(); ++i) {
    if (products[i].defined()) {
      sums_[i] = (products[i].detach().to(at::kDouble) * directions_[i].to(at::kDouble)).sum();
    }
  }
}

void HutchinsonProbe::restore() {
  if (restored_) {
    return;
  }
  restored_ = true;
  const detail::NumericsGuard guard;
  for (size_t i = 0; i < params_.size(); ++i) {
    params_[i].detach().copy_(before_[i]);
    params_[i].mutable_grad() = grads_[i];
  }
}

at::Tensor HutchinsonProbe::traces() const {
  std::vector<double> out;
  for (size_t i = 0; i < params_.size(); i += 2) {
    const bool known = sums_[i].defined() && sums_[i + 1].defined();
    out.push_back(known ? sums_[i].item<double>() + sums_[i + 1].item<double>()
                        : std::numeric_limits<double>::quiet_NaN());
  }
  return at::tensor(out, at::kDouble);
}

const at::Tensor& HutchinsonProbe::direction_a(int64_t layer) const {
  return directions_.at(2 * static_cast<size_t>(layer));
}

const at::Tensor& HutchinsonProbe::direction_b(int64_t layer) const {
  return directions_.at(2 * static_cast<size_t>(layer) + 1);
}

}  // namespace ctrlora
