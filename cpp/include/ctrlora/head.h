// A head that is trained along: what its outputs say about how far a step of the adapters may go,
// and how long its own step is.
//
// A head is a full linear layer behind the last adapter (a classifier, a regression's output). A
// fresh one knows nothing, and no metric of the layers before it feels a step then. Its outputs z
// and the loss' gradient there do: a step that changes them by the share r changes the loss by at
// most r |dloss/dz| |z| to first order (Cauchy-Schwarz), whatever the layers together did. AdamW
// moves the head itself: every weight by lr, which moves the outputs of a wide head far and those
// of a narrow one hardly. Its inputs tell how far; its step is made as long at any width.
// cpp/README.md, section 4.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "ctrlora/export.h"
#include "ctrlora/processes.h"

namespace ctrlora {

/// What the heads of an engine showed, step by step.
///
/// A row whose gradient is zero everywhere (padding, an ignored label) or not finite is none.
/// Outputs count from their mean over the rows of a step: what all rows share is the head's bias,
/// and tells nothing apart. Thread-safe where backward calls it. Nothing synchronises.
class CTRLORA_API HeadMeter {
 public:
  HeadMeter();

  /// Inputs of one head that are kept between two steps, at most: what came first.
  static constexpr int64_t kInputs = 1024;

  /// One more head with this weight (m, n); its number. Heads side by side count as one.
  int64_t add_head(const at::Tensor& weight);
  /// @param sums (3 + 2 m) float64 over the rows of one backward of a head: their number,
  /// sum of |z|^2, of |dloss/dz|^2, of z, and of dloss/dz <x, probe>, x the head's input.
  /// @param inputs (R, n) some of the x, zeros for rows that are none; undefined: not known.
  void add(int64_t head, const at::Tensor& sums, const at::Tensor& inputs = {});
  /// Forgets what came since the last commit.
  void drop();
  /// AdamW's direction for this step's gradient alone, (m', n), some of its rows; undefined: none.
  /// The next commit enters what it does to the outputs, with this weight of the old average.
  void set_direction(int64_t head, const at::Tensor& direction, double beta);
  /// Enters what came into the averages, bias-corrected EMAs of sum |z - mean|^2 and of sum
  /// |dloss/dz|^2 over all heads; one with more than 25 times its mean (a spike, section 6) counts
  /// as 25 times. A head with less than two rows has no say. dloss/dz counts as .grad does: what
  /// the weight's gradient times the probe is less than those sums, clipping has taken off all
  /// gradients.
  /// @param loss_scale factor on the loss in backward. @param processes add up first; may be null.
  void commit(double beta, double loss_scale, const Processes* processes);
  /// |dloss/dz| |z - mean| in nats: what a change of the outputs by their own spread is worth at
  /// most, (1) float64; infinite before the first commit with rows.
  [[nodiscard]] at::Tensor sensitivity() const;
  /// Factors on AdamW's learning rate by which a direction of one gradient changes a head's outputs
  /// by `step` times that rate, rms over rows and outputs, at most 1000, (heads) float64; 1 before
  /// the first commit with inputs and a direction.
  [[nodiscard]] at::Tensor gains(double step) const;

  /// By name; live tensors.
  [[nodiscard]] std::vector<std::pair<std::string, at::Tensor>> named_tensors() const;

 private:
  struct Head {
    at::Tensor weight;
    at::Tensor sums;                 // since the last commit; zeros: nothing
    std::vector<at::Tensor> inputs;  // since then
    at::Tensor direction;            // of the commit to come; undefined: none
    double direction_beta = 0.0;
  };
  [[nodiscard]] static at::Tensor moved(const Head& own);
  void enter(const std::vector<at::Tensor>& moved);

  std::mutex mutex_;
  std::vector<Head> heads_;
  at::Tensor squares_;        // (2) float64, biased
  at::Tensor weight_;         // (2) float64, sums of coefficients
  at::Tensor change_square_;  // (heads) float64, biased: of outputs by a direction
  at::Tensor change_weight_;  // (heads) float64
};

/// A forward of a head that waits for its backward. Holds its outputs by reference; where they were
/// overwritten meanwhile it says nothing.
class CTRLORA_API HeadCapture {
 public:
  HeadCapture(std::weak_ptr<HeadMeter> meter,
              int64_t head,
              const at::Tensor& inputs,
              const at::Tensor& outputs);
  /// `output_grad` (..., m) is the gradient of the head's output. A second call is ignored.
  void complete(const at::Tensor& output_grad);

 private:
  std::weak_ptr<HeadMeter> meter_;
  int64_t head_;
  at::Tensor outputs_;    // undefined: done
  at::Tensor projected_;  // (rows) <x, probe>
  at::Tensor inputs_;     // (R, n), evenly spaced rows of x
  int64_t version_;
};

/// One head's end of the channel. Made by register_head(); an engine that trains the head's weight
/// plugs itself in.
class CTRLORA_API HeadSlot {
 public:
  /// Whether the next forward should be captured: somebody listens. Cheap: one atomic load.
  [[nodiscard]] bool wanted() const { return wanted_.load(std::memory_order_relaxed); }
  void set_wanted(bool wanted) { wanted_.store(wanted, std::memory_order_relaxed); }
  /// Plugs in the receiver; `head` is its own number for this slot.
  void connect(const std::weak_ptr<HeadMeter>& meter, int64_t head);
  /// `inputs` (..., n) and `outputs` (..., m) of the head, to be completed by the gradient of the
  /// latter. Null when nothing listens or there is no row.
  std::shared_ptr<HeadCapture> capture(const at::Tensor& inputs, const at::Tensor& outputs);

  /// A number of its own, from 1 on, by which graphs of compilers name it.
  [[nodiscard]] int64_t handle() const { return handle_; }
  /// The registered slot of that number, or null. Thread-safe.
  static std::shared_ptr<HeadSlot> find(int64_t handle);

 private:
  friend std::shared_ptr<HeadSlot> register_head(const at::Tensor& weight);
  int64_t handle_ = 0;
  std::atomic<bool> wanted_{false};
  std::mutex mutex_;
  std::weak_ptr<HeadMeter> meter_;
  int64_t head_ = -1;
};

/// Makes the layer with this weight known as a head that is trained along, to any optimizer that is
/// built over the weight afterwards. The registry holds it weakly; the same weight again returns
/// the slot it has. Thread-safe.
CTRLORA_API std::shared_ptr<HeadSlot> register_head(const at::Tensor& weight);
/// Its slot, or null.
CTRLORA_API std::shared_ptr<HeadSlot> find_head(const at::Tensor& weight);
/// Takes it out of the registry; an unknown weight is ignored.
CTRLORA_API void unregister_head(const at::Tensor& weight);

/// For C++ programs, around each forward of a registered head: its outputs are observed once their
/// gradient comes. Without a graph, a registration or a listener nothing happens.
/// @returns `outputs`.
CTRLORA_API at::Tensor watch_head(const at::Tensor& weight,
                                  const at::Tensor& inputs,
                                  const at::Tensor& outputs);

}  // namespace ctrlora
