// The two Kronecker factors of each layer of a group, with what is observed beside them.
//
// Omega = E[x x^T] (input factor) and S = E[g^ g^T] (output factor): K-FAC of Martens & Grosse
// (2015), expand setting of Eschenhagen et al. (2023), empirical Fisher. cpp/README.md, section 2.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ctrlora/export.h"
#include "ctrlora/low_rank_eigen.h"
#include "ctrlora/options.h"

namespace ctrlora::detail {
class Owners;
}

namespace ctrlora {

struct Processes;  // processes.h

/// One batch's sums for L layers.
struct CTRLORA_API CurvatureSketch {
  FactorSketch input;        ///< of x
  FactorSketch output;       ///< of g, unscaled
  at::Tensor base_square;    ///< (L) float64: sum of w |W0 x|^2; negative: unknown
  at::Tensor sequences;      ///< (L) float64: sequences seen
  at::Tensor from_gradient;  ///< (L) bool: rows came from the adapter's gradients (gradient proxy)

  [[nodiscard]] std::vector<at::Tensor> tensors() const {
    return {input.product, input.trace, input.weight, output.product, output.trace,
            output.weight, base_square, sequences,    from_gradient};
  }
};

class CTRLORA_API KroneckerFactors {
 public:
  KroneckerFactors() = default;
  /// Identity factors for L layers; k is min(sketch_rank, d, dense_limit) per side.
  KroneckerFactors(int64_t layers,
                   int64_t in_features,
                   int64_t out_features,
                   const Options& options,
                   const at::TensorOptions& tensor_options);

  LowRankEigen input;      ///< Omega, (L, n, ...)
  LowRankEigen output;     ///< S, (L, m, ...)
  at::Tensor base_square;  ///< (L) float64: |W0|_Omega^2 = E|W0 x|^2, observed or assumed
  at::Tensor seen;         ///< (L) float64: batches that entered
  at::Tensor absolute;     ///< (L) bool: S has an absolute scale (observed, not the gradient proxy)
  at::Tensor misses;       ///< (L) int64: failed decompositions in a row

  [[nodiscard]] KroneckerFactors slice(int64_t begin, int64_t end) const;

  /// Takes over the other's numbers in place; same shapes.
  void assign(const KroneckerFactors& other);

  /// Enters one batch into these layers: EMA weight b = min(factor_beta, 1 - 1/seen), loss scaling
  /// of S as options say, unit-gain assumption for the base under the gradient proxy.
  void commit(const CurvatureSketch& sketch, const Options& options);

  struct Commit;
  /// The same for the layers of several shapes on one device, their small tensors as one batch.
  /// @param owners divides the decompositions between processes, all of which call this with equal
  /// numbers; null: everything is done here.
  static void commit_all(const std::vector<Commit>& parts,
                         const Options& options,
                         detail::Owners* owners = nullptr);
  /// Those owners, with the memory for what they send: take it where an exception still stops the
  /// training, since the other processes wait for one that never comes.
  static std::shared_ptr<detail::Owners> owners(const std::vector<Commit>& parts,
                                                std::shared_ptr<const Processes> processes);

  [[nodiscard]] std::vector<std::pair<std::string, at::Tensor>> named_tensors() const;
  void to(const at::TensorOptions& options);

 private:
  static void enter(const std::vector<Commit>& parts,
                    const Options& options,
                    detail::Owners* owners);
};

/// What KroneckerFactors::commit_all takes of the layers of one shape.
struct KroneckerFactors::Commit {
  KroneckerFactors factors;  ///< a view: what it is a view of is updated
  CurvatureSketch sketch;
};

}  // namespace ctrlora
