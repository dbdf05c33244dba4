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
  /// Adds a group to the space it fits, or to a new one.
  static void sort_in(std::vector<RankSpace>& spaces,
                      const std::shared_ptr<LayerGroup>& group,
                      const GroupSettings& settings);

  /// Measures all layers and decides direction and length inside the output ball.
  void propose(const Options& options);
  /// Half the squared Fisher norm at those lengths, as a quartic in a common factor; one per layer.
  [[nodiscard]] Quartic predicted_kl() const;
  /// Largest lr / initial lr of the groups, at most 1.
  [[nodiscard]] double schedule() const;
  /// Moves the parameters by shrink (1) times the proposed length and ends the groups' step.
  void apply(const at::Tensor& shrink) const;

  /// What the last step did, one number per layer: (L).
  struct Change {
    at::Tensor relative_output;     // |D|_Omega / |W0|_Omega
    at::Tensor predicted_decrease;  // of the loss
  };
  [[nodiscard]] Change change(const at::Tensor& shrink) const;

 private:
  struct Member {
    std::shared_ptr<LayerGroup> group;
    GroupSettings settings;
  };

  [[nodiscard]] bool takes(const LayerGroup& group) const;
  void update_sizes(const Options& options) const;

  std::vector<Member> members_;
  Proposal proposal_;
};

}  // namespace ctrlora::detail
