// Curvature-guided initialisation: A and B from the whitened gradient of a few calibration batches.
//
//   G~ ~= U Sigma V^T,  B0 = -c S_g^-1/2 U Sigma^1/2,  A0 = c Sigma^1/2 V^T O_g^-1/2
//   c such that |s B0 A0|_O = init_radius |W0|_O                                  (cpp/README.md,
//   9)
//
// After CG-LoRA (arXiv 2603.29824), not bit for bit. Use:
//
//   CgInit init(pairs, CgInitOptions{});
//   for (...) { forward and backward once; init.end_batch(); }
//   init.apply(init.finish());
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ctrlora/export.h"
#include "ctrlora/kronecker_factors.h"
#include "ctrlora/lora_pair.h"
#include "ctrlora/whitened_gradient.h"

namespace ctrlora {

namespace detail {
class CalibrationGroup;
}

struct CTRLORA_API CgInitOptions {
  /// Calibration batches, >= 4. The first quarter estimates the factors, the rest fills the sketch:
  /// in two halves, which tell signal from noise. 8: as cheap as eight training steps.
  int64_t batches = 8;

  /// |s B0 A0|_O / |W0|_O, in (0, 1): relative change of each layer's output. 0.01 [M].
  double init_radius = 0.01;

  /// Whether B starts at zero, A as otherwise: the model's function is kept.
  bool zero_b = false;

  /// Exponent of the metric, in [0, 1]. One half, as in training [M].
  double whitening = 0.5;

  /// lambda as a share of a factor's mean eigenvalue, > 0; as in training [M].
  double damping = 0.01;

  /// Eigenpairs kept per factor, >= 1; as in training.
  int64_t sketch_rank = 16;

  /// Columns of the gradient's sketch, >= rank; 0: WhitenedGradient::default_probes(rank).
  int64_t probes = 0;

  /// Standard deviations of the noise by which the halves must agree on a direction to keep it, >=
  /// 0. 0 keeps every direction on which they agree at all, half of pure noise among them.
  double deviations = 2.0;

  /// Largest dimension for which a complete basis is allowed, >= 1.
  int64_t dense_limit = 256;

  /// Seed of the probes and of the directions that fill up.
  uint64_t seed = 0;

  [[nodiscard]] int64_t factor_batches() const { return batches / 4; }
  /// @throws c10::ValueError naming the option, its value and the rule.
  void validate() const;
};

/// Start values of L layers. Rank r; the first r' <= r directions come from the sketch.
struct CTRLORA_API InitialPair {
  at::Tensor a;       ///< (L, r, n)
  at::Tensor b;       ///< (L, m, r); zero columns for directions that are not kept
  at::Tensor radius;  ///< (L) float64: |s B A|_O / |W0|_O, 0 where B = 0
};

/// The start values alone, for any directions.
/// @param directions of G~, r' columns. @param kept (L, r') bool; the others, and those up to
/// `rank`, become random whitened directions off the kept ones, at zero B.
/// @param scaling (L) float64 s.
CTRLORA_API InitialPair initial_pair(const WhitenedSvd& directions,
                                     const at::Tensor& kept,
                                     const WhiteningMetric& input,
                                     const WhiteningMetric& output,
                                     const at::Tensor& base_square,
                                     const at::Tensor& scaling,
                                     int64_t rank,
                                     const CgInitOptions& options);

/// What came out for one layer. Tensors on the CPU, float64, unless said.
struct CTRLORA_API LayerInit {
  std::string name;
  at::Tensor a;             ///< (r, n) start value, dtype and device of the statistics
  at::Tensor b;             ///< (m, r)
  at::Tensor spectrum;      ///< (r') singular values of G~
  at::Tensor split_half;    ///< (r') the same without the noise's share
  int64_t kept = 0;         ///< directions that came from the gradient
  int64_t rows = 0;         ///< rows with a gradient that entered the sketch; 0: not calibrated
  double energy_kept = 0.;  ///< share of |G~|_F^2 in the kept directions
  double noise_floor = 0.;  ///< largest singular value that noise alone would have
  double effective_samples = 0.;
  double radius = 0.;  ///< |s B A|_O / |W0|_O
};

/// One calibration pass over the layers of `pairs`, through their observation slots.
class CTRLORA_API CgInit {
 public:
  /// Takes over the pairs' slots and sets each b to zero: gradients are those of the base.
  /// @throws c10::ValueError if an option is out of range, a pair is invalid or not registered.
  CgInit(const std::vector<LoraPair>& pairs, const CgInitOptions& options);
  /// Gives the slots back and, unless apply() was called, every b its old values.
  ~CgInit();
  CgInit(const CgInit&) = delete;
  CgInit& operator=(const CgInit&) = delete;

  /// Ends a calibration batch. @return layers that were observed in it.
  int64_t end_batch();

  /// Start values, in the order of the pairs. Layers that saw no gradient keep what they have
  /// (rows = 0). Synchronises. No parameter is written.
  /// @throws c10::ValueError if batches are missing, a row was not finite, no layer or a layer with
  /// fewer rows than its rank was observed.
  [[nodiscard]] std::vector<LayerInit> finish() const;

  /// Writes them into the pairs' tensors.
  void apply(const std::vector<LayerInit>& layers);

  /// Stops listening and undoes what is undone: what the destructor does.
  void release();

  /// Bytes of all statistics at their largest.
  [[nodiscard]] int64_t bytes() const;

  /// The statistics by name; live tensors. finish() depends on nothing else but the options.
  [[nodiscard]] std::vector<std::pair<std::string, at::Tensor>> named_tensors() const;
  /// Restores them: the batches are done. @throws c10::ValueError printing the names or shapes that
  /// differ, before any change.
  void load(const std::map<std::string, at::Tensor>& tensors);

 private:
  CgInitOptions options_;
  std::vector<LoraPair> pairs_;
  std::vector<std::shared_ptr<detail::CalibrationGroup>> groups_;
  std::vector<std::pair<size_t, size_t>> places_;  // of each pair: group, layer
  int64_t batch_ = 0;
};

/// weight -= scaling b a in place, without a second matrix of its size, so that base + scaling b a
/// is what base was. @param weight (m, n), or (n, m) if `transposed`.
/// @throws c10::ValueError if the shapes do not fit or the weight is not floating point.
CTRLORA_API void shift_base(const at::Tensor& weight,
                            const at::Tensor& a,
                            const at::Tensor& b,
                            double scaling,
                            bool transposed);

}  // namespace ctrlora
