#include "detail/rank_space.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <map>
#include <optional>

#include "detail/tensor_math.h"

namespace ctrlora::detail {

int64_t RankSpace::layers() const {
  int64_t count = 0;
  for (const Member& member : members_) {
    count += member.group->layers();
  }
  return count;
}

bool RankSpace::takes(const LayerGroup& group, int64_t most) const {
  const LayerGroup& own = *members_.front().group;
  const auto same = [](const LowRankEigen& x, const LowRankEigen& y) {
    return x.sketch_rank() == y.sketch_rank() && x.basis().device() == y.basis().device() &&
           x.basis().scalar_type() == y.basis().scalar_type();
  };
  return own.rank() == group.rank() && same(own.factors().input, group.factors().input) &&
         same(own.factors().output, group.factors().output) && layers() + group.layers() <= most;
}

std::vector<RankSpace> RankSpace::sort(const std::vector<Member>& members) {
  int64_t most = 0;
  for (const Member& member : members) {
    most += member.group->layers();
  }
  if (!members.empty() && members.front().group->factors().base_square.is_cpu()) {
    most = (most + at::get_num_threads() - 1) / at::get_num_threads();
  }
  std::vector<RankSpace> spaces;
  for (size_t i = 0; i < members.size(); ++i) {
    auto space = std::find_if(spaces.begin(), spaces.end(), [&](const RankSpace& known) {
      return known.takes(*members[i].group, most);
    });
    if (space == spaces.end()) {
      space = spaces.insert(space, RankSpace());
    }
    space->members_.push_back(members[i]);
    space->places_.push_back(i);
  }
  return spaces;
}

RankSpace::Measured RankSpace::measure() const {
  Measured out;
  out.parts.reserve(2 * members_.size());
  for (const Member& member : members_) {
    out.parts.push_back(member.group->measure(member.settings));
  }
  for (const Member& member : members_) {
    if (std::optional<Measurement> raw = member.group->measure_gradients()) {
      out.parts.push_back(std::move(*raw));
      out.sized.push_back(member.group.get());
    }
  }
  return out;
}

// Directions of the momenta and, for the layers whose sizes are due, of the raw gradients: one
// batch, since it is the number of operations that counts.
void RankSpace::decide(const Measured& measured, const Options& options) {
  const Measurement joint = Measurement::cat(measured.parts);
  const Direction all = direction(joint, options);
  if (measured.sized.empty()) {
    proposal_ = ctrlora::propose(joint, all, options);
    return;
  }
  const auto members = measured.parts.begin() + static_cast<std::ptrdiff_t>(members_.size());
  Measurement own = Measurement::cat({measured.parts.begin(), members});
  const int64_t count = own.scaling.size(0);
  const DirectionSquare raw = all.slice(count, all.output_norm.c2.size(0)).square();
  int64_t begin = 0;
  for (LayerGroup* group : measured.sized) {
    const int64_t end = begin + group->measured_layers();
    group->update_rms({raw.square.slice(0, begin, end), raw.ok.slice(0, begin, end)});
    begin = end;
  }
  std::vector<at::Tensor> rms;
  rms.reserve(members_.size());
  for (const Member& member : members_) {
    rms.push_back(member.group->direction_rms());
  }
  own.direction_rms = at::cat(rms);
  proposal_ = ctrlora::propose(own, all.slice(0, count), options);
}

void RankSpace::propose(std::vector<RankSpace>& spaces, const Options& options) {
  std::vector<Measured> measured;
  measured.reserve(spaces.size());
  for (const RankSpace& space : spaces) {
    measured.push_back(space.measure());
  }
  const auto decide = [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      spaces[i].decide(measured[i], options);
    }
  };
  const auto count = static_cast<int64_t>(spaces.size());
  if (measured.front().parts.front().scaling.is_cpu()) {
    at::parallel_for(0, count, 1, decide);  // small operations: a thread takes a space
  } else {
    decide(0, count);
  }
}

// part(space)(begin, end) of every member, in the order of the groups: sums over them do not depend
// on how many spaces there are.
template <typename Value, typename Part>
std::vector<Value> RankSpace::by_place(const std::vector<RankSpace>& spaces, const Part& part) {
  std::map<size_t, Value> sorted;
  for (const RankSpace& space : spaces) {
    const auto slice = part(space);
    int64_t begin = 0;
    for (size_t i = 0; i < space.members_.size(); ++i) {
      const int64_t end = begin + space.members_[i].group->layers();
      sorted[space.places_[i]] = slice(begin, end);
      begin = end;
    }
  }
  std::vector<Value> parts;
  parts.reserve(sorted.size());
  for (const auto& item : sorted) {
    parts.push_back(item.second);
  }
  return parts;
}

Quartic RankSpace::predicted_kl(const std::vector<RankSpace>& spaces) {
  return Quartic::sum(by_place<Quartic>(spaces, [](const RankSpace& space) {
    const at::Tensor& f = space.proposal_.length;
    const Quartic norm = space.proposal_.fisher_norm.where(space.proposal_.ok);
    const at::Tensor square = 0.5 * f.square();
    const Quartic kl = {norm.c2 * square, norm.c3 * square * f, norm.c4 * square * f.square()};
    return [kl](int64_t begin, int64_t end) { return kl.slice(begin, end); };
  }));
}

at::Tensor RankSpace::predicted_decrease(const std::vector<RankSpace>& spaces) {
  const at::Device device = spaces.front().proposal_.length.device();
  const auto parts = by_place<at::Tensor>(spaces, [&](const RankSpace& space) {
    const at::Tensor decrease = space.decrease(space.proposal_.length).to(device);
    return [decrease](int64_t begin, int64_t end) { return decrease.slice(0, begin, end); };
  });
  return at::cat(parts).sum(0, /*keepdim=*/true);
}

at::Tensor RankSpace::decrease(const at::Tensor& length) const {
  const at::Tensor zero = at::zeros({}, length.options());
  return at::where(proposal_.ok, proposal_.step.predicted_decrease * length, zero);
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
    begin = end;
  }
}

void RankSpace::finish() const {
  for (const Member& member : members_) {
    member.group->finish();
  }
}

RankSpace::Change RankSpace::change(const at::Tensor& shrink) const {
  const at::Tensor f = proposal_.length * shrink.to(proposal_.length.device());
  std::vector<at::Tensor> rates;
  for (const Member& member : members_) {
    const double rate = member.settings.lr * member.settings.radius_factor;
    rates.push_back(at::full({member.group->layers()}, rate, f.options()));
  }
  const at::Tensor zero = at::zeros({}, f.options());
  const at::Tensor relative = proposal_.output_norm(f).clamp_min(0).sqrt() * at::cat(rates) /
                              proposal_.radius.clamp_min(1e-300);
  return {at::where(proposal_.ok, relative, zero), decrease(f)};
}

}  // namespace ctrlora::detail
