// y = x W^T + bias + scaling (x A^T) B^T as one autograd node that observes itself.
//
// The adapter's product is added into the base's output and the base's input gradient takes the
// adapter's in place: two passes over y and dx less than a module tree. On the steps an engine
// wants, the node has x, the base's output and g at hand and delivers them; no hook is needed.
// cpp/README.md, section 2.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>

#include "ctrlora/export.h"
#include "ctrlora/observation.h"

namespace ctrlora {

/// Base linear layer and adapter in one node. The base is frozen: no gradient for weight or bias.
/// @param inputs (..., n). @param weight (m, n), or (n, m) if `transposed` (transformers' Conv1D).
/// @param bias (m) or none. @param a (r, n), b (m, r): cast to the inputs' dtype if they differ.
/// @param slot where to deliver observations; null: nowhere.
/// Under autocast all operands are cast to the autocast dtype, as torch's linear does.
/// @throws c10::ValueError if shapes do not fit.
CTRLORA_API at::Tensor lora_linear(const at::Tensor& inputs,
                                   const at::Tensor& weight,
                                   const std::optional<at::Tensor>& bias,
                                   const at::Tensor& a,
                                   const at::Tensor& b,
                                   double scaling,
                                   const std::shared_ptr<ObservationSlot>& slot,
                                   bool transposed);

/// The same for a base that computes its own output (a quantised layer, say):
/// base_output + scaling (x A^T) B^T, in base_output's dtype. Gradients reach inputs through both
/// paths.
CTRLORA_API at::Tensor lora_delta(const at::Tensor& inputs,
                                  const at::Tensor& base_output,
                                  const at::Tensor& a,
                                  const at::Tensor& b,
                                  double scaling,
                                  const std::shared_ptr<ObservationSlot>& slot);

}  // namespace ctrlora
