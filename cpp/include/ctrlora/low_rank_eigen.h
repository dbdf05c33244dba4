// A symmetric positive semi-definite matrix per layer as eigenpairs plus an isotropic tail.
//
//   F = U diag(e) U^T + rho (I - U U^T),   rho = (tr F - sum e) / (d - k)          (cpp/README.md,
//   2)
//
// The trace is exact whatever the basis misses. Nothing (d, d) is formed for k < d. A value type:
// use it alone with any batch of second moments. Not thread-safe.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "ctrlora/export.h"

namespace ctrlora {

/// F_p = U diag(diag + tail) U^T + tail (I - U U^T): F (damped) raised to a power, as coefficients.
struct CTRLORA_API PowerCoefficients {
  at::Tensor tail;  ///< (L) float64: (rho + lambda)^p
  at::Tensor diag;  ///< (L, k) float64: (e + lambda)^p - tail

  [[nodiscard]] PowerCoefficients slice(int64_t begin, int64_t end) const;
  /// Layers of several groups below each other; one k.
  static PowerCoefficients cat(const std::vector<PowerCoefficients>& parts);
};

/// Sums over rows that one batch adds to a factor; linear in the rows.
struct CTRLORA_API FactorSketch {
  at::Tensor product;  ///< (L, d, k): sum of w x (x^T U)
  at::Tensor trace;    ///< (L) float64: sum of w |x|^2
  at::Tensor weight;   ///< (L) float64: sum of w; 0 = nothing seen
  /// Whether an update may overwrite `product` instead of allocating as much.
  bool disposable = false;
};

class CTRLORA_API LowRankEigen {
 public:
  LowRankEigen() = default;

  /// The identity for L layers of size d with k eigenpairs.
  /// @param options device and dtype (float32 or float64) of the basis.
  /// @param wide whether the basis' columns are contiguous in memory, as A's rows are; else its
  /// rows.
  /// @param narrow keeps a float32 basis as bfloat16; everything is computed in float32.
  LowRankEigen(int64_t layers,
               int64_t size,
               int64_t sketch_rank,
               const at::TensorOptions& options,
               bool wide = false,
               bool narrow = false);

  [[nodiscard]] int64_t layers() const { return basis_.size(0); }
  [[nodiscard]] int64_t size() const { return basis_.size(1); }
  [[nodiscard]] int64_t sketch_rank() const { return basis_.size(2); }
  [[nodiscard]] const at::Tensor& basis() const { return basis_; }  // (L, d, k) as it is kept
  /// What is computed in: float32 or float64.
  [[nodiscard]] at::ScalarType dtype() const { return narrow_ ? at::kFloat : basis_.scalar_type(); }
  [[nodiscard]] at::TensorOptions options() const { return basis_.options().dtype(dtype()); }
  /// The basis in that type: a copy where it is kept narrow.
  [[nodiscard]] at::Tensor computed_basis() const { return basis_.to(dtype()); }
  [[nodiscard]] const at::Tensor& eigenvalues() const { return eigenvalues_; }  // (L, k) float64
  [[nodiscard]] const at::Tensor& trace() const { return trace_; }              // (L) float64

  /// A view of layers [begin, end): updates through it reach this object.
  [[nodiscard]] LowRankEigen slice(int64_t begin, int64_t end) const;

  /// First basis of the layers in `where` (L) bool: orthonormalised X^T Theta from rows (L, R, d);
  /// Theta is Gaussian from (seed). A complete basis (k = d) starts at the identity.
  void start_basis(const at::Tensor& rows, const at::Tensor& where, uint64_t seed);

  /// Sketch of `rows` (L, R, d) with row weights (L, R) (0 = leave out) in the present basis.
  /// @param squares (L, R) float64 of the rows' norms, if they are known already.
  [[nodiscard]] FactorSketch sketch(const at::Tensor& rows,
                                    const at::Tensor& row_weights,
                                    const at::Tensor& squares = {}) const;

  /// F <- keep F + (1 - keep) scale E[x x^T] from the sketch, basis refreshed by one warm Nystrom
  /// power iteration. Layers with keep = 1, no weight, or non-finite sums stay bit for bit.
  /// @param keep (L) float64 EMA weight b of the old factor.
  /// @param scale (L) float64 factor on the sketch's mean (the output factor's loss scaling).
  /// @return (L) bool: layers whose decomposition failed (they kept their old state).
  at::Tensor update(const FactorSketch& sketch, const at::Tensor& keep, const at::Tensor& scale);

  struct Update;
  /// The same for several factors that update together, their small tensors as one batch: the
  /// number of operations is what a refresh of narrow layers costs.
  /// @return failures of all, below each other.
  static at::Tensor update_all(const std::vector<Update>& parts);
  /// Whether both can be updated in one call: one sketch rank and dtype, both bases complete or
  /// neither.
  [[nodiscard]] bool updates_with(const LowRankEigen& other) const;

  /// (L) float64: rho, never negative; 0 for a complete basis.
  [[nodiscard]] at::Tensor tail() const;

  /// Coefficients of (F + lambda I)^exponent, lambda = damping tr F / d. damping = 0 with exponent
  /// 1 is F itself.
  [[nodiscard]] PowerCoefficients power(double exponent, double damping) const;

  /// (F + lambda I)^exponent @ v for v (L, d, c).
  [[nodiscard]] at::Tensor apply_power(const at::Tensor& v, double exponent, double damping) const;

  /// (L) share of the trace held by the basis, in [0, 1].
  [[nodiscard]] at::Tensor captured_share() const;

  /// (L, d, d) dense matrix, for tests and small d only.
  [[nodiscard]] at::Tensor to_dense() const;

  /// Everything needed to restore, by name; tensors are the live ones.
  [[nodiscard]] std::vector<std::pair<std::string, at::Tensor>> named_tensors() const;

  /// Moves the state to another device; the basis takes the dtype too.
  void to(const at::TensorOptions& options);

 private:
  at::Tensor basis_;  // (L, d, k)
  bool narrow_ = false;
  at::Tensor eigenvalues_;  // (L, k) float64
  at::Tensor trace_;        // (L) float64
};

/// What LowRankEigen::update_all takes of one factor.
struct LowRankEigen::Update {
  LowRankEigen factor;  ///< a view: what it is a view of is updated
  FactorSketch sketch;
  at::Tensor keep, scale;  ///< (L) float64
};

}  // namespace ctrlora
