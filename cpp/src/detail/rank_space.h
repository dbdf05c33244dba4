// The layers of one step that share a rank and a sketch rank, whatever their widths: what is
// decided from rank-space products is decided for all of them at once.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "ctrlora/layer_group.h"
#include "ctrlora/options.h"
#include "ctrlora/proposal.h"

namespace ctrlora::detail {

class RankSpace {
 public:
  /// A group that takes part in this step.
  struct Member {
    std::shared_ptr<LayerGroup> group;
    GroupSettings settings;
  };

  /// Sorts groups by rank and sketch rank; on a CPU into enough spaces that every thread has some
  /// layers to decide on.
  static std::vector<RankSpace> sort(const std::vector<Member>& members);
  /// Measures all layers and decides direction and length inside the output ball.
  static void propose(std::vector<RankSpace>& spaces, const Options& options);
  /// Half the squared Fisher norm of all layers at those lengths, as one quartic in a common
  /// factor. Summed group by group, whatever space a group is in.
  static Quartic predicted_kl(const std::vector<RankSpace>& spaces);
  /// First-order decrease of the loss at those lengths, (1), summed in the same order.
  static at::Tensor predicted_decrease(const std::vector<RankSpace>& spaces);
  /// Largest lr / initial lr of the groups, at most 1.
  [[nodiscard]] double schedule() const;
  /// Moves the parameters by shrink (1) times the proposed length.
  void apply(const at::Tensor& shrink) const;
  /// Ends the groups' step.
  void finish() const;

  /// What the last step did, one number per layer: (L).
  struct Change {
    at::Tensor relative_output;     // |D|_Omega / |W0|_Omega
    at::Tensor predicted_decrease;  // of the loss
  };
  [[nodiscard]] Change change(const at::Tensor& shrink) const;

 private:
  template <typename Value, typename Part>
  static std::vector<Value> by_place(const std::vector<RankSpace>& spaces, const Part& part);
  [[nodiscard]] at::Tensor decrease(const at::Tensor& length) const;  // (L), 0 where not ok
  [[nodiscard]] bool takes(const LayerGroup& group, int64_t most) const;
  [[nodiscard]] int64_t layers() const;
  struct Measured {
    std::vector<Measurement> parts;  // of the members, then of their raw gradients
    std::vector<LayerGroup*> sized;  // whose raw gradients are there
  };
  [[nodiscard]] Measured measure() const;
  void decide(const Measured& measured, const Options& options);

  std::vector<Member> members_;
  std::vector<size_t> places_;  // of the members among all groups
  Proposal proposal_;
};

}  // namespace ctrlora::detail
