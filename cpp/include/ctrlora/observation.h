// Rows of a layer's inputs and output gradients, from the layer to the engine (cpp/README.md, 2).
//
// Flow: the layer's forward asks `slot.wanted()`; if so, `slot.capture(x, base_output)` samples
// rows at once (no reference to x is kept, so checkpointing keeps its memory saving); the
// gradient's hook calls `capture.complete(g)`, which samples the same rows of g and hands both to
// the sink. A layer that is an autograd node of its own has x again in its backward and samples it
// there: between the two nothing but row numbers is kept. A capture whose backward never comes is
// dropped with its graph. Counted once per backward in both modes of activation checkpointing: only
// one of the two forwards is ever completed.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "ctrlora/export.h"

namespace ctrlora {

/// What one backward of one layer says about its curvature.
struct CTRLORA_API Observation {
  at::Tensor inputs;        ///< (R, n) sampled rows x, any float dtype
  at::Tensor output_grads;  ///< (R, m) the same rows of g = dloss/dy
  at::Tensor base_square;   ///< (R) float64 |W0 x|^2 per row; undefined if unknown
  double row_weight = 1.;   ///< N / R: rows that each sampled row stands for
  int64_t sequences = 0;    ///< sequences in the batch (leading dimension of 3-d inputs, else rows)
};

/// Sampled rows of one input tensor, for all layers that receive it in turn (q/k/v, gate/up): by
/// their identity sketches are shared. Empty until the first of them has the input at hand. Filled
/// by its sampler alone.
struct CTRLORA_API InputRows {
  at::Tensor values;    ///< (R, n)
  int64_t version = 0;  ///< of `values` when they were taken
};

/// Draws rows without state of its own but (seed, step): stratified, row floor((i + u_i) N / R).
/// Source of randomness: Philox4x32-10 (Salmon et al. 2011), counter-based, so that a resumed run
/// draws the same rows. Thread-safe.
class CTRLORA_API RowSampler {
 public:
  /// @param keep_references whether inputs of which all rows are taken are held instead of copied:
  /// no memory beside what autograd keeps, but an input that is overwritten in place is lost.
  RowSampler(int64_t sample_rows, uint64_t seed, bool keep_references = false)
      : sample_rows_(sample_rows), seed_(seed), keep_references_(keep_references) {}

  void set_step(int64_t step);
  /// Processes draw independently of each other.
  void set_process(int64_t rank);

  /// Indices (R) int64 of the rows of micro-batch `micro_batch`, or an undefined tensor if all
  /// `rows` rows are taken.
  at::Tensor sample(int64_t rows, int64_t micro_batch, at::Device device);

  /// Where to put those rows of `inputs`: one place for layers that receive one tensor in turn.
  std::shared_ptr<InputRows> rows_of(const at::Tensor& inputs, const at::Tensor& rows);

  /// Copies rows of `flat` (N, n), if it is defined, to where there are none yet; what is there
  /// then. @param saved whether autograd keeps `flat` as long as needed: all rows by reference.
  at::Tensor fill(InputRows& place, const at::Tensor& flat, const at::Tensor& rows, bool saved);

  /// An input was overwritten before its backward: from now on copies.
  void stop_keeping_references();

 private:
  using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct LastRows {
    WeakTensor source{c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()};
    int64_t version = 0;
    at::Tensor index;
    std::shared_ptr<InputRows> rows;
  };
  std::mutex mutex_;
  int64_t sample_rows_;
  uint64_t seed_;
  bool keep_references_;
  int64_t step_ = 0;
  int64_t process_ = 0;
  // The last draw: all layers of one micro-batch share it.
  int64_t cached_rows_ = -1;
  int64_t cached_micro_batch_ = -1;
  at::Tensor cached_;
  LastRows last_;
};

/// Receives observations; implemented by LayerGroup.
class CTRLORA_API ObservationSink {
 public:
  ObservationSink() = default;
  ObservationSink(const ObservationSink&) = delete;
  ObservationSink& operator=(const ObservationSink&) = delete;
  virtual ~ObservationSink() = default;
  virtual RowSampler& sampler() = 0;
  /// Backwards of `layer` completed since the last step: numbers the micro-batches.
  virtual int64_t micro_batch(int64_t layer) const = 0;
  /// Whether |W0 x|^2 of the rows is of use: a pass over the base's output in the forward.
  [[nodiscard]] virtual bool wants_base_square() const { return true; }
  /// Called from backward, perhaps on an autograd thread. Must not throw on bad numbers.
  virtual void observe(int64_t layer, const Observation& observation) = 0;
};

class Capture;

/// One layer's end of the channel. Created by register_pair(); an engine plugs itself in.
class CTRLORA_API ObservationSlot : public std::enable_shared_from_this<ObservationSlot> {
 public:
  /// A slot that find() knows.
  static std::shared_ptr<ObservationSlot> make();
  ObservationSlot() = default;
  ObservationSlot(const ObservationSlot&) = delete;
  ObservationSlot& operator=(const ObservationSlot&) = delete;
  ~ObservationSlot();

  /// Whether the next forward should be captured. Cheap: one atomic load.
  [[nodiscard]] bool wanted() const { return wanted_.load(std::memory_order_relaxed); }
  void set_wanted(bool wanted) { wanted_.store(wanted, std::memory_order_relaxed); }

  /// Plugs in (or, with null, out) the receiver; `layer` is its own number for this slot.
  void connect(const std::weak_ptr<ObservationSink>& sink, int64_t layer);

  /// Who listens now, and whether it wants the next forward: to borrow the slot and give it back.
  struct Connection {
    std::weak_ptr<ObservationSink> sink;
    int64_t layer = -1;
    bool wanted = false;
  };
  [[nodiscard]] Connection connection();
  void connect(const Connection& connection);

  /// Samples rows of `inputs` (..., n) and, if defined, of `base_output` (..., m), the frozen base
  /// layer's output. Null when nothing listens or there is no row.
  /// @param saved whether `inputs` are handed to Capture::complete: they are sampled there.
  std::shared_ptr<Capture> capture(const at::Tensor& inputs,
                                   const at::Tensor& base_output,
                                   bool saved = false);

  /// A number of its own, from 1 on, by which graphs of compilers name it.
  [[nodiscard]] int64_t handle() const { return handle_; }
  /// The slot of that number; null if it is gone or there never was one. Thread-safe.
  static std::shared_ptr<ObservationSlot> find(int64_t handle);

  /// Observations delivered in this slot's life.
  [[nodiscard]] int64_t observations() const { return observations_.load(); }

 private:
  friend class Capture;
  std::atomic<bool> wanted_{false};
  std::atomic<int64_t> observations_{0};
  int64_t handle_ = 0;  // 0: unknown to find()
  std::mutex mutex_;
  std::weak_ptr<ObservationSink> sink_;
  int64_t layer_ = -1;
};

/// A forward waiting for its backward.
class CTRLORA_API Capture {
 public:
  /// Delivers the observation; `output_grad` (..., m) is the gradient of the layer's output. Never
  /// modifies it. A second call, or one whose row count differs, is ignored, and so is an input
  /// that was overwritten meanwhile.
  /// @param inputs (..., n) as in the forward, where that was promised to capture(); else ignored.
  void complete(const at::Tensor& output_grad, const at::Tensor& inputs = {});

 private:
  friend class ObservationSlot;
  std::weak_ptr<ObservationSlot> slot_;
  Observation observation_;
  at::Tensor rows_;  // sampled row numbers; undefined: all
  std::shared_ptr<InputRows> inputs_;
  int64_t total_rows_ = 0;
  bool done_ = false;
};

}  // namespace ctrlora
