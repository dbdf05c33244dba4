// What one step would do, decided from rank-space products alone: direction, norms, length.
//
// Nothing here depends on the layers' widths, so layers of all groups with one rank and one sketch
// rank are decided together: some hundred small batched operations for the whole model.
// cpp/README.md, sections 3 and 4.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "ctrlora/export.h"
#include "ctrlora/options.h"
#include "ctrlora/tangent_step.h"
#include "ctrlora/trust_region.h"

namespace ctrlora {

/// L layers as a step finds them. Tensors (L) float64 unless said otherwise.
struct CTRLORA_API Measurement {
  SideProducts input;        ///< of A^T, its momentum and Omega's basis
  SideProducts output;       ///< of B, its momentum and S's basis
  SideMetric input_metric;   ///< Omega
  SideMetric output_metric;  ///< S
  at::Tensor scaling;
  at::Tensor momentum_factor;  ///< bias correction and sign: M^ = factor M
  at::Tensor radius;           ///< lr |W0|_Omega
  at::Tensor direction_rms;    ///< |D| expected of a raw gradient's direction; 0: not known yet
  at::Tensor live;             ///< (L) bool: the gradient exists and is finite
  at::Tensor absolute;         ///< (L) bool: the factors have an absolute scale
  at::Tensor isotropic;        ///< c of M = c I, for curvature "hutchinson"; 0: not known
  double rounding = 0.0;       ///< rounding unit of the products' dtype

  /// Layers below each other; one rank, one sketch rank and one device.
  static Measurement cat(const std::vector<Measurement>& parts);
};

/// What one step would do, before the Fisher ball. Tensors (L) float64 unless said otherwise.
struct CTRLORA_API Proposal {
  TangentStep step;                          ///< zero where it failed
  PlainStepGrams input_grams, output_grams;  ///< of the step
  Quartic output_norm;                       ///< |D(f)|_Omega^2
  Quartic fisher_norm;                       ///< |D(f)|_M^2, zero without an absolute scale
  at::Tensor radius, momentum_factor;        ///< as measured
  at::Tensor length;                         ///< f inside the output ball; 0 where not ok
  at::Tensor ok;                             ///< (L) bool: this layer moves
  at::Tensor spike;                          ///< (L) bool: momentum to be forgotten afterwards
  at::Tensor live, sound;                    ///< (L) bool: gradient usable; numbers came out finite

  /// Layers [begin, end).
  [[nodiscard]] Proposal slice(int64_t begin, int64_t end) const;
};

struct CTRLORA_API DirectionSquare {
  at::Tensor square;  ///< |D|_Omega^2
  at::Tensor ok;      ///< (L) bool: it could be computed
};

/// The best tangent step and its Grams, before any length.
struct CTRLORA_API Direction {
  TangentStep step;                          ///< zero where it failed
  PlainStepGrams input_grams, output_grams;  ///< of the step
  StepGrams input_omega;                     ///< input_grams in Omega
  Quartic output_norm;                       ///< |D(f)|_Omega^2

  [[nodiscard]] DirectionSquare square() const;
  /// Layers [begin, end).
  [[nodiscard]] Direction slice(int64_t begin, int64_t end) const;
};

CTRLORA_API Direction direction(const Measurement& measured, const Options& options);

/// Squared size of that direction alone.
CTRLORA_API DirectionSquare direction_square(const Measurement& measured, const Options& options);

CTRLORA_API Proposal propose(const Measurement& measured, const Options& options);
/// @param direction of `measured`, for who has it already.
CTRLORA_API Proposal propose(const Measurement& measured,
                             const Direction& direction,
                             const Options& options);

}  // namespace ctrlora
