// Statistics of same-shaped layers during calibration: first the factors, then the two sketches.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "ctrlora/cg_init.h"
#include "ctrlora/observation.h"
#include "ctrlora/options.h"
#include "detail/pending_observations.h"

namespace ctrlora::detail {

class CalibrationGroup : public ObservationSink {
 public:
  CalibrationGroup(std::vector<LoraPair> pairs,
                   const CgInitOptions& options,
                   std::shared_ptr<RowSampler> sampler);

  /// Borrows the slots of `self`'s pairs and sets every b to zero; release() undoes both.
  static void borrow(const std::shared_ptr<CalibrationGroup>& self);
  void release();
  /// The values of b are no longer to be restored.
  void forget_b() { old_b_.clear(); }

  RowSampler& sampler() override { return *sampler_; }
  [[nodiscard]] int64_t micro_batch(int64_t layer) const override;
  [[nodiscard]] bool wants_base_square() const override {
    return batch_ < options_.factor_batches();
  }
  void observe(int64_t layer, const Observation& observation) override;

  /// @return layers observed in this batch.
  int64_t end_batch(int64_t batch);

  /// One per pair. @throws c10::ValueError for bad rows; see CgInit::finish.
  [[nodiscard]] std::vector<LayerInit> finish() const;

  [[nodiscard]] int64_t bytes() const;
  [[nodiscard]] std::vector<std::pair<std::string, at::Tensor>> named_tensors() const;
  /// The statistics were overwritten.
  void after_load();
  /// Makes the second phase's tensors, so that there is something to load into.
  void start_sketch();

 private:
  struct Coordinates {                       // of the last input: layers that share it share these
    at::Tensor source, inputs, coordinates;  // as observed; converted
    int64_t share_set = -1;
  };
  void add_to_sketch(int64_t layer, const Observation& observation);
  void commit_factors();
  void check_rows() const;
  void finish_slice(int64_t begin, int64_t end, std::vector<LayerInit>& out) const;
  [[nodiscard]] int64_t rank() const { return pairs_.front().rank(); }
  [[nodiscard]] int64_t layers() const { return static_cast<int64_t>(pairs_.size()); }

  mutable std::mutex mutex_;
  std::vector<LoraPair> pairs_;
  CgInitOptions options_;
  Options factor_options_;
  std::shared_ptr<RowSampler> sampler_;
  std::vector<std::pair<std::shared_ptr<ObservationSlot>, ObservationSlot::Connection>> borrowed_;
  std::vector<at::Tensor> old_b_;

  int64_t batch_ = 0;
  std::vector<uint8_t> seen_;  // in this batch
  KroneckerFactors factors_;
  PendingObservations pending_;
  WhitenedGradient gradient_;
  std::array<GradientSketch, 2> halves_;
  Coordinates last_;
  at::Tensor finite_;  // (L) bool: no NaN or inf among the rows so far
  at::Tensor rows_;    // (L) float64: rows with a gradient that entered the sketch
};

}  // namespace ctrlora::detail
