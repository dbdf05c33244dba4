#include "detail/rank_space.h"

#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>

#include "detail/tensor_math.h"

namespace ctrlora::detail {

bool RankSpace::takes(const LayerGroup& group) const {
  const LayerGroup& own = *members_.front().group;
  const auto same = [](const LowRankEigen& x, const LowRankEigen& y) {
    return x.sketch_rank() == y.sketch_rank() &&
           x.basis().options().type_equal(y.basis().options());
  };
  return own.rank() == group.rank() &&
         own.factors().input.basis().device() == group.factors().input.basis().device() &&
         same(own.factors().input, group.factors().input) &&
         same(own.factors().output, group.factors().output);
}

void RankSpace::sort_in(std::vector<RankSpace>& spaces,
                        const std::shared_ptr<LayerGroup>& group,
                        const GroupSettings& settings) {
  auto space = std::find_if(spaces.begin(), spaces.end(),
                            [&](const RankSpace& known) { return known.takes(*group); });
  if (space == spaces.end()) {
    space = spaces.insert(space, RankSpace());
  }
  space->members_.push_back({group, settings});
}

// The raw gradients' directions, sized on the layers observed in this step.
void RankSpace::update_sizes(const Options& options) const {
  std::vector<Measurement> parts;
  std::vector<LayerGroup*> groups;
  for (const Member& member : members_) {
    std::optional<Measurement> part = member.group->measure_gradients();
    if (part) {
      parts.push_back(std::move(*part));
      groups.push_back(member.group.get());
    }
  }
  if (parts.empty()) {
    return;
  }
  const DirectionSquare all = direction_square(Measurement::cat(parts), options);
  int64_t begin = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t end = begin + parts[i].scaling.size(0);
    groups[i]->update_rms({all.square.slice(0, begin, end), all.ok.slice(0, begin, end)});
    begin = end;
  }
}

void RankSpace::propose(const Options& options) {
  update_sizes(options);
  std::vector<Measurement> parts;
  parts.reserve(members_.size());
  for (const Member& member : members_) {
    parts.push_back(member.group->measure(member.settings));
  }
  proposal_ = ctrlora::propose(Measurement::cat(parts), options);
}

Quartic RankSpace::predicted_kl() const {
  const at::Tensor& f = proposal_.length;
  const Quartic norm = proposal_.fisher_norm.where(proposal_.ok);
  const at::Tensor square = 0.5 * f.square();
  return {norm.c2 * square, norm.c3 * square * f, norm.c4 * square * f.square()};
}

double RankSpace::schedule() const {
  double ratio = 0.0;
  for (const Member& member : members_) {
    const GroupSettings& own = member.settings;
    ratio = std::max(ratio, own.initial_lr > 0.0 ? std::min(1.0, own.lr / own.initial_lr) : 1.0);
  }
  return ratio;
}

void RankSpace::apply(const at::Tensor& shrink) const {
  int64_t begin = 0;
  for (const Member& member : members_) {
    const int64_t end = begin + member.group->layers();
    member.group->apply(proposal_.slice(begin, end), shrink.to(proposal_.length.device()),
                        member.settings);
    member.group->finish();
    begin = end;
  }
}

RankSpace::Change RankSpace::change(const at::Tensor& shrink) const {
  const at::Tensor f = proposal_.length * shrink.to(proposal_.length.device());
  std::vector<at::Tensor> rates;
  for (const Member& member : members_) {
    rates.push_back(at::full({member.group->layers()}, member.settings.lr, f.options()));
  }
  const at::Tensor zero = at::zeros({}, f.options());
  const at::Tensor relative = proposal_.output_norm(f).clamp_min(0).sqrt() * at::cat(rates) /
                              proposal_.radius.clamp_min(1e-300);
  return {at::where(proposal_.ok, relative, zero),
          at::where(proposal_.ok, proposal_.step.predicted_decrease * f, zero)};
}

}  // namespace ctrlora::detail
