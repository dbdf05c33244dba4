// The balanced gauge: among all (B R^-1, A R) of one product BA, the one with P = Q = Sigma.
//
//   Q = L L^T,  L^T P L = V diag(sigma^2) V^T,  R = Sigma^1/2 V^T L^-1 (cpp/README.md, 5)
//
// sigma_i is then the curvature-weighted size of component i.
#pragma once

#include <ATen/core/Tensor.h>

#include "ctrlora/export.h"

namespace ctrlora {

/// A <- map A, B <- B inverse; momenta (gradients) the other way: M_A <- inverse^T M_A, M_B <- M_B
/// map^T.
struct CTRLORA_API GaugeMap {
  at::Tensor map;      ///< R (L, r, r) float64
  at::Tensor inverse;  ///< R^-1 (L, r, r) float64
  at::Tensor sigma;    ///< (L, r) float64, descending
  at::Tensor ok;       ///< (L) bool; elsewhere map = inverse = I
};

/// The map to the balanced gauge. Sigma is floored at 0.01 of its maximum inside R, so that
/// directions which B does not have keep A rows of usable size. Directions with neither an A row
/// nor a B column come last and stay exactly zero. Layers with P = 0 or a failed decomposition keep
/// their gauge.
/// @param gram_b P, gram_a Q: (L, r, r) float64.
CTRLORA_API GaugeMap balance(const at::Tensor& gram_b, const at::Tensor& gram_a);

/// Applies the map in place to slabs a (L,r,n), b (L,m,r) and their momenta.
CTRLORA_API void apply_gauge(const GaugeMap& gauge,
                             const at::Tensor& a,
                             const at::Tensor& b,
                             const at::Tensor& momentum_a,
                             const at::Tensor& momentum_b);

}  // namespace ctrlora
