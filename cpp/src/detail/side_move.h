// What one step does to one side of a layer: W <- keep W + M X1 + U X2 + W X3, lengths included,
// with the products that carry its Grams over. cpp/README.md, sections 3 and 4.
#pragma once

#include <ATen/core/Tensor.h>

#include "ctrlora/tangent_step.h"

namespace ctrlora::detail {

struct SideMove {
  SideStep step;         // X1, X2, X3, with the length inside
  PlainStepGrams grams;  // of that step

  /// f (L) times a step; `momentum_factor` (L) turns the momentum into the step's own.
  static SideMove scaled(const SideStep& step,
                         const PlainStepGrams& grams,
                         const at::Tensor& f,
                         const at::Tensor& momentum_factor);
  /// Adds -rate s^2 F_gamma W other, the curvature decay of this side. `other` is the other side's
  /// Gram (Q for B, P for A^T); rate and scaling (L). The rate is cut where it would take
  /// more than half of the stiffest direction.
  void decay(const PowerCoefficients& metric,
             const at::Tensor& other,
             const at::Tensor& rate,
             const at::Tensor& scaling);
  /// W^T W and U^T W after W <- keep W + this; keep (L, 1, 1).
  [[nodiscard]] at::Tensor carried_ww(const at::Tensor& keep) const;
  [[nodiscard]] at::Tensor carried_uw(const at::Tensor& keep) const;
};

}  // namespace ctrlora::detail
