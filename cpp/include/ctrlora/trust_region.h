// Length (search): how far along the direction. cpp/README.md, section 4.
//
// The step of a layer changes W by D(f) = s (f T + f^2 Z), T = B dA + dB A, Z = dB dA, cross term
// included; every squared norm of D(f) is a quartic in f. All values are device tensors; no host
// sync.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "ctrlora/export.h"
#include "ctrlora/tangent_step.h"

namespace ctrlora {

/// |D(f)|^2 = c2 f^2 + c3 f^3 + c4 f^4, one per layer, (L) float64.
struct CTRLORA_API Quartic {
  at::Tensor c2;  ///< |s T|^2
  at::Tensor c3;  ///< 2 <s T, s Z>
  at::Tensor c4;  ///< |s Z|^2

  [[nodiscard]] at::Tensor operator()(const at::Tensor& f) const;
  [[nodiscard]] Quartic slice(int64_t begin, int64_t end) const;
  /// Zero for the layers that are not in `mask` (L) bool.
  [[nodiscard]] Quartic where(const at::Tensor& mask) const;
  /// Sum over all entries of all parts, (1), on the first one's device.
  static Quartic sum(const std::vector<Quartic>& parts);
};

/// Squared norm of D(f): `output` Grams in the left metric, `input` Grams in Omega.
CTRLORA_API Quartic squared_norm(const StepGrams& input,
                                 const StepGrams& output,
                                 const at::Tensor& scaling);

/// How far along D(f) with |D(f)| <= radius and f <= start: `start` if inside, else the crossing by
/// a fixed number of Newton iterations, safeguarded by the triangle-inequality bound, which is
/// always inside and stands in where Newton fails. @param radius, start (L) float64, >= 0.
CTRLORA_API at::Tensor inside_ball(const Quartic& norm,
                                   const at::Tensor& radius,
                                   const at::Tensor& start);

/// The model problem min <G, D> + 1/2 <D, S D Omega> s.t. |D|_F <= radius, for factors given by
/// their eigenvalues and G in their eigenbases (Kronecker eigenbasis). Newton on 1/|D(nu)| -
/// 1/radius with D = -G / (s_i o_j + nu): More & Sorensen (1983); Conn, Gould & Toint (2000),
/// algorithm 7.3.1. A value type, usable alone; not on the engine's hot path.
struct CTRLORA_API TrustRegionSubproblem {
  at::Tensor gradient;            ///< (L, m, n) U_S^T G U_Omega
  at::Tensor output_eigenvalues;  ///< (L, m) >= 0
  at::Tensor input_eigenvalues;   ///< (L, n) >= 0

  struct Solution {
    at::Tensor step;            ///< (L, m, n) D in the eigenbasis
    at::Tensor multiplier;      ///< (L) nu >= 0
    at::Tensor model_decrease;  ///< (L) >= 0
    at::Tensor iterations;      ///< (L) Newton iterations until |D| was within tolerance
  };

  /// @param radius (L) > 0. @param tolerance relative error of |D|.
  /// @throws c10::ValueError if shapes do not fit or a radius is not positive.
  [[nodiscard]] Solution solve(const at::Tensor& radius,
                               double tolerance = 1e-12,
                               int64_t max_iterations = 50) const;
};

}  // namespace ctrlora
