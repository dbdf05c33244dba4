// Singular directions of the whitened gradient G~ = S_g^-1/2 G O_g^-1/2 from rows of x and g alone.
//
//   Y = G~ Theta,  Z = G~^T Psi  ->  Q = orth(Y),  G~ ~= Q ((Psi^T Q)^+ Z^T)     (cpp/README.md, 9)
//
// A two-sided single-pass sketch (Tropp, Yurtsever, Udell & Cevher 2017) with the metric inside the
// probes, linear in the rows. No (m, n), (m, m) or (n, n) object exists. Serves initialisation and
// rank growth; S_g = (S + lambda I)^whitening as everywhere. All types hold L layers of one shape.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "ctrlora/export.h"
#include "ctrlora/kronecker_factors.h"
#include "ctrlora/low_rank_eigen.h"

namespace ctrlora {

/// One side of the metric, F_g = (F + lambda I)^whitening, lambda = damping tr F / d.
struct CTRLORA_API WhiteningMetric {
  LowRankEigen factor;
  double whitening = 0.5;
  double damping = 0.01;

  [[nodiscard]] at::Tensor whiten(const at::Tensor& v) const;    ///< F_g^-1/2 v, v (L, d, c)
  [[nodiscard]] at::Tensor unwhiten(const at::Tensor& v) const;  ///< F_g^1/2 v
  /// F_g^-1/2 F F_g^-1/2 on the factor's basis: what whitening leaves of the noise's covariance.
  [[nodiscard]] PowerCoefficients noise() const;
  [[nodiscard]] at::Tensor noise_peak() const;   ///< (L) its largest eigenvalue
  [[nodiscard]] at::Tensor noise_trace() const;  ///< (L)
  /// (L, r): v^T noise v for unit columns v of (L, d, r).
  [[nodiscard]] at::Tensor noise_along(const at::Tensor& directions) const;
};

/// Sums over rows. Sketches of parts of the rows add up to the sketch of all.
struct CTRLORA_API GradientSketch {
  at::Tensor range;    ///< (L, m, p): sum of g (x^T O_g^-1/2 Theta)
  at::Tensor corange;  ///< (L, n, q): sum of x (g^T S_g^-1/2 Psi)
  at::Tensor batches;  ///< (L) float64: batches that entered; G is their mean

  [[nodiscard]] GradientSketch slice(int64_t begin, int64_t end) const;
  [[nodiscard]] GradientSketch operator+(const GradientSketch& other) const;
};

/// left right^T with left (L, m, p), right (L, n, p).
struct CTRLORA_API FactoredGradient {
  at::Tensor left;
  at::Tensor right;
};

struct CTRLORA_API WhitenedSvd {
  at::Tensor left;    ///< U (L, m, r), zero columns beyond the numerical rank
  at::Tensor values;  ///< (L, r) float64, descending
  at::Tensor right;   ///< V (L, n, r)
  at::Tensor ok;      ///< (L) bool: the layer's sums were finite; elsewhere all is zero
};

/// The r largest singular triplets, r <= p, by (p, p) algebra in float64. Values below the rounding
/// of the Grams come out as 0.
CTRLORA_API WhitenedSvd svd(const FactoredGradient& gradient, int64_t rank);

/// (L, r) float64: u_i^T (left right^T) v_i for given directions U (L, m, r), V (L, n, r).
CTRLORA_API at::Tensor along(const FactoredGradient& gradient,
                             const at::Tensor& left,
                             const at::Tensor& right);

/// (L, r) float64 singular values without the noise's share: directions from one half of the rows,
/// values from the other, both ways, averaged, clamped at 0. Needs no sample count.
CTRLORA_API at::Tensor split_half_values(const FactoredGradient& first,
                                         const FactoredGradient& second,
                                         int64_t rank);

/// The singular values of noise alone: Gaussian rows with covariances S, O, whitened. With
/// whitening = 1 it is white: unit = 1/sqrt(N_eff), rows = m, columns = n.
struct CTRLORA_API NoiseModel {
  at::Tensor unit;     ///< (L) float64: largest standard deviation of any u^T G~ v
  at::Tensor rows;     ///< (L) stable rank of the output side, <= m
  at::Tensor columns;  ///< (L) of the input side, <= n

  /// (L) unit (sqrt(rows) + sqrt(columns)): noise does not exceed it (Chevet's inequality).
  [[nodiscard]] at::Tensor floor() const;
  /// Gavish & Donoho (2017): the values (L, r) a Frobenius-optimal denoiser keeps; 0 under the
  /// floor.
  [[nodiscard]] at::Tensor shrink(const at::Tensor& values) const;
};

/// Metric and probes of a group of layers: makes sketches and reads them.
class CTRLORA_API WhitenedGradient {
 public:
  WhitenedGradient() = default;

  /// @param factors of L layers; held by reference to their tensors, must not change any more.
  /// @param probes p, capped at min(m, n); q = min(2 p + 1, m). 2 rank + 8 by default_probes().
  /// @throws c10::ValueError if probes < 1.
  WhitenedGradient(const KroneckerFactors& factors,
                   double whitening,
                   double damping,
                   int64_t probes,
                   uint64_t seed);

  /// Twice the rank: the error of the best rank-r part is then at most about twice the tail's
  /// (Tropp et al. 2017, theorem 4.3).
  static int64_t default_probes(int64_t rank) { return 2 * rank + 8; }
  /// Bytes of one sketch of these sizes per layer.
  static int64_t sketch_bytes(int64_t in_features,
                              int64_t out_features,
                              int64_t probes,
                              int64_t element_size);

  [[nodiscard]] int64_t layers() const { return input_.factor.layers(); }
  [[nodiscard]] const WhiteningMetric& input() const { return input_; }
  [[nodiscard]] const WhiteningMetric& output() const { return output_; }

  [[nodiscard]] WhitenedGradient slice(int64_t begin, int64_t end) const;
  [[nodiscard]] GradientSketch empty() const;

  /// x^T O_g^-1/2 Theta for rows of layer `layer`: (R, n) -> (R, p). Layers with equal inputs and
  /// factors may share it.
  [[nodiscard]] at::Tensor input_coordinates(int64_t layer, const at::Tensor& inputs) const;

  /// Adds rows of one layer: inputs (R, n), output_grads (R, m), both finite; rows to be left out
  /// are zero in output_grads. @param coordinates input_coordinates(layer, inputs). Does not count
  /// the batch.
  void add(GradientSketch& sums,
           int64_t layer,
           const at::Tensor& inputs,
           const at::Tensor& coordinates,
           const at::Tensor& output_grads) const;

  /// G~ of the mean batch, from the sums. Exact if p and q reach the rank of G~.
  [[nodiscard]] FactoredGradient reconstruct(const GradientSketch& sums) const;

  /// (L) float64 unbiased estimate of |G~|_F^2, noise included.
  [[nodiscard]] at::Tensor energy(const GradientSketch& sums) const;

  /// (L) float64: independent samples that would leave the noise that two halves differ by.
  /// Infinite where they agree; meaningless where a half is empty.
  [[nodiscard]] at::Tensor effective_samples(const GradientSketch& first,
                                             const GradientSketch& second) const;

  /// What pure noise looks like with that many samples, (L).
  [[nodiscard]] NoiseModel noise(const at::Tensor& effective_samples) const;

  /// (L, r) float64: standard deviation of u_i^T G~ v_i under that noise.
  [[nodiscard]] at::Tensor deviation(const WhitenedSvd& directions,
                                     const at::Tensor& effective_samples) const;

  /// (I - Pi_B) G~ (I - Pi_A): what the pair B (L, m, r), A (L, r, n) cannot reach; Pi are the
  /// orthogonal projectors onto S_g^1/2 B and O_g^1/2 A^T. Zero columns and rows take away nothing.
  [[nodiscard]] FactoredGradient residual(const FactoredGradient& gradient,
                                          const at::Tensor& b,
                                          const at::Tensor& a) const;

 private:
  [[nodiscard]] at::Tensor corange_energy(const at::Tensor& corange) const;

  WhiteningMetric input_, output_;
  at::Tensor theta_, psi_;               // (1, n, p), (1, m, q), orthonormal columns
  at::Tensor input_mix_, output_mix_;    // (L, k, p), (L, k, q): coefficients on the bases
  at::Tensor input_tail_, output_tail_;  // (L, 1, 1)
};

}  // namespace ctrlora
