// What the fused LoRA layer computes, forward and backward, without autograd: shared by the node
// of lora_linear.cpp and by the operator that compilers see (lora_operator.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <optional>

#include "ctrlora/observation.h"

namespace ctrlora::detail {

/// (..., d) as (N, d).
at::Tensor as_rows(const at::Tensor& x);

struct LoraOutput {
  at::Tensor output;                 // (..., m)
  std::shared_ptr<Capture> capture;  // null: nothing is observed
};

/// base + scaling (x A^T) B^T. @param weight (m, n), or undefined: then `base_or_bias` is the
/// base's output, else its bias, if it has one. @param slot asked for the capture; null: nothing
/// captured. @param source the inputs as the caller has them, by which layers that share them know
/// it.
LoraOutput lora_forward(const at::Tensor& inputs,
                        const at::Tensor& weight,
                        const std::optional<at::Tensor>& base_or_bias,
                        const at::Tensor& a,
                        const at::Tensor& b,
                        double scaling,
                        const std::shared_ptr<ObservationSlot>& slot,
                        const at::Tensor& source);

/// Gradients of inputs, a and b; those not needed stay undefined.
struct LoraGradients {
  at::Tensor inputs, a, b;
};
LoraGradients lora_backward(const at::Tensor& grad,
                            const at::Tensor& inputs,
                            const at::Tensor& weight,
                            const at::Tensor& a,
                            const at::Tensor& b,
                            double scaling,
                            std::array<bool, 3> needed);

}  // namespace ctrlora::detail
