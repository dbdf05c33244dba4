#include "ctrlora/lora_module.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/nn/init.h>

#include <cmath>
#include <utility>

#include "ctrlora/lora_linear.h"
#include "ctrlora/lora_pair.h"
#include "detail/check.h"

namespace ctrlora {

LoRALinearImpl::LoRALinearImpl(const torch::nn::Linear& base_layer,
                               int64_t adapter_rank,
                               double alpha,
                               std::string name)
    : base(base_layer),
      rank(adapter_rank),
      scaling(alpha / static_cast<double>(adapter_rank)),
      layer_name(std::move(name)) {
  CTRLORA_CHECK(rank >= 1, "ctrlora::LoRALinear", "rank = ", rank,
                ". Violated constraint: a whole number >= 1.");
  CTRLORA_CHECK(std::isfinite(alpha) && alpha > 0.0, "ctrlora::LoRALinear", "alpha = ", alpha,
                ". Violated constraint: alpha > 0.");
  adapt();
}

void LoRALinearImpl::reset() {
  base = torch::nn::Linear(base->options);
  adapt();
}

std::shared_ptr<torch::nn::Module> LoRALinearImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto copy = torch::nn::Cloneable<LoRALinearImpl>::clone(device);
  std::dynamic_pointer_cast<LoRALinearImpl>(copy)->freeze_base();
  return copy;
}

void LoRALinearImpl::freeze_base() {
  for (at::Tensor& frozen : base->parameters()) {
    frozen.requires_grad_(false);
  }
}

void LoRALinearImpl::adapt() {
  register_module("base", base);
  freeze_base();
  const bool wide = base->weight.scalar_type() == at::kDouble;
  const auto placed = base->weight.options().dtype(wide ? at::kDouble : at::kFloat);
  lora_a = register_parameter("lora_a", at::empty({rank, base->options.in_features()}, placed));
  lora_b = register_parameter("lora_b", at::zeros({base->options.out_features(), rank}, placed));
  torch::nn::init::kaiming_uniform_(lora_a, std::sqrt(5.0));
  slot_ = register_pair({.a = lora_a, .b = lora_b, .scaling = scaling, .name = layer_name});
}

at::Tensor LoRALinearImpl::forward(const at::Tensor& inputs) {
  const std::optional<at::Tensor> bias =
      base->bias.defined() ? std::optional<at::Tensor>(base->bias) : std::nullopt;
  return lora_linear(inputs, base->weight, bias, lora_a, lora_b, scaling, slot_,
                     /*transposed=*/false);
}

void LoRALinearImpl::pretty_print(std::ostream& stream) const {
  stream << "ctrlora::LoRALinear(in_features=" << base->options.in_features()
         << ", out_features=" << base->options.out_features() << ", rank=" << rank
         << ", scaling=" << scaling << ")";
}

}  // namespace ctrlora
