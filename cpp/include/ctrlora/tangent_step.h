// Direction (descent): the best step on the tangent space of rank-r matrices in the K-FAC metric.
//
//   dB = -(1/s^2) (S_g^-1 - 1/2 B P^-1 B^T) M_B Q^-1,   dA = -(1/s^2) P^-1 M_A (O_g^-1 - 1/2 A^T
//   Q^-1 A)
//
// with P = B^T S_g B, Q = A O_g A^T, metric to the power gamma: the M-orthogonal projection of the
// preconditioned full gradient step. Independent of the gauge and of s. With gamma = 0 it is
// LoRA-Pro (arXiv 2407.18242) / Riemannian LoRA (arXiv 2402.02347). cpp/README.md, section 3.
//
// Both sides are one problem with a tall W (d, r): B itself, or A^T. The step is a combination
// M X1 + U X2 + W X3 of slabs that exist already, so nothing (d, r) is formed here.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "ctrlora/export.h"
#include "ctrlora/low_rank_eigen.h"

namespace ctrlora {

/// Products of one side's slabs: W (L,d,r), M (L,d,r), U (L,d,k). All float64.
struct CTRLORA_API SideProducts {
  at::Tensor ww;  ///< (L, r, r) W^T W
  at::Tensor uw;  ///< (L, k, r) U^T W
  at::Tensor um;  ///< (L, k, r) U^T M
  at::Tensor wm;  ///< (L, r, r) W^T M
  at::Tensor mm;  ///< (L, r, r) M^T M

  /// Products for M scaled by factor (L), e.g. bias correction or a sign.
  [[nodiscard]] SideProducts scale_momentum(const at::Tensor& factor) const;
  /// The three products with the momentum. @param weight (L,d,r), momentum (L,d,r), basis (L,d,k);
  /// views of any strides.
  void set_momentum(const at::Tensor& weight, const at::Tensor& momentum, const at::Tensor& basis);
  /// The two products of weight and basis.
  void set_weight(const at::Tensor& weight, const at::Tensor& basis);
  [[nodiscard]] SideProducts slice(int64_t begin, int64_t end) const;
  /// Layers of several groups below each other; one r and one k.
  static SideProducts cat(const std::vector<SideProducts>& parts);
};

/// All five products.
CTRLORA_API SideProducts side_products(const at::Tensor& weight,
                                       const at::Tensor& momentum,
                                       const at::Tensor& basis);

/// The metric of one side as coefficients on its basis.
struct CTRLORA_API SideMetric {
  PowerCoefficients whiten;    ///< F_gamma
  PowerCoefficients unwhiten;  ///< F_gamma^-1
  PowerCoefficients plain;     ///< F, undamped

  static SideMetric of(const LowRankEigen& factor, double whitening, double damping);
  [[nodiscard]] SideMetric slice(int64_t begin, int64_t end) const;
  static SideMetric cat(const std::vector<SideMetric>& parts);
};

/// W^T N W for N given as coefficients: tail ww + uw^T diag uw.
CTRLORA_API at::Tensor weighted_gram(const PowerCoefficients& metric,
                                     const at::Tensor& uw,
                                     const at::Tensor& ww);

/// delta = M momentum + U basis + W weight.
struct CTRLORA_API SideStep {
  at::Tensor momentum;  ///< X1 (L, r, r)
  at::Tensor basis;     ///< X2 (L, k, r)
  at::Tensor weight;    ///< X3 (L, r, r)

  [[nodiscard]] SideStep slice(int64_t begin, int64_t end) const;
  /// Zero for the layers that are not in `ok` (L) bool, whatever their numbers are.
  [[nodiscard]] SideStep where(const at::Tensor& ok) const;
  /// The step itself, (L, d, r), for use outside the engine.
  [[nodiscard]] at::Tensor materialize(const at::Tensor& weight_slab,
                                       const at::Tensor& momentum_slab,
                                       const at::Tensor& basis_slab) const;
};

struct CTRLORA_API TangentStep {
  SideStep a;                     ///< transposed: for A^T
  SideStep b;                     ///< for B
  at::Tensor predicted_decrease;  ///< (L) -(<M_A, dA> + <M_B, dB>), >= 0 up to rounding
  at::Tensor ok;                  ///< (L) bool: Grams were decomposed, everything is finite

  [[nodiscard]] TangentStep slice(int64_t begin, int64_t end) const;
};

/// The direction for L layers. @param scaling (L) float64. @param eps rounding unit of the
/// products' dtype. Never throws on bad numbers: such layers come out as zero with ok = false.
CTRLORA_API TangentStep tangent_step(const SideProducts& input,
                                     const SideMetric& input_metric,
                                     const SideProducts& output,
                                     const SideMetric& output_metric,
                                     const at::Tensor& scaling,
                                     double gram_floor,
                                     double eps);

/// Inner products of W and delta in a metric N: what every norm of the step is made of.
struct CTRLORA_API StepGrams {
  at::Tensor ww;  ///< (L, r, r) W^T N W
  at::Tensor wd;  ///< (L, r, r) W^T N delta
  at::Tensor dd;  ///< (L, r, r) delta^T N delta
};

/// The same for N = I, with the basis' products: what the Grams in any metric follow from.
struct CTRLORA_API PlainStepGrams : StepGrams {
  at::Tensor uw;  ///< (L, k, r) U^T W
  at::Tensor ud;  ///< (L, k, r) U^T delta

  [[nodiscard]] StepGrams in(const PowerCoefficients& metric) const;
  [[nodiscard]] PlainStepGrams slice(int64_t begin, int64_t end) const;
};

/// Grams of one side's step.
CTRLORA_API PlainStepGrams step_grams(const SideProducts& products, const SideStep& step);

}  // namespace ctrlora
