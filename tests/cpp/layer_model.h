// A group of small layers with slots, stepped by hand.
#pragma once

#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ctrlora/layer_group.h"
#include "problems.h"

namespace layer_model {

inline constexpr int64_t kIn = 6;
inline constexpr int64_t kOut = 5;
inline constexpr int64_t kRank = 2;
inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// Layers with slots and a group over them.
struct Layers {
  std::vector<ctrlora::LoraPair> pairs;
  std::vector<std::shared_ptr<ctrlora::ObservationSlot>> slots;
  std::shared_ptr<ctrlora::LayerGroup> group;
  ctrlora::Options options;
  ctrlora::SideStream side;

  explicit Layers(int64_t count,
                  const ctrlora::Options& settings = {},
                  bool trained = true,
                  at::ScalarType dtype = at::kDouble)
      : options(settings), side(settings.overlap) {
    for (int64_t l = 0; l < count; ++l) {
      pairs.push_back(problems::make_pair(kOut, kIn, kRank, trained, dtype));
      pairs.back().name = "layer " + std::to_string(l);
      slots.push_back(ctrlora::register_pair(pairs.back()));
    }
    const auto sampler = std::make_shared<ctrlora::RowSampler>(options.sample_rows, options.seed);
    group = std::make_shared<ctrlora::LayerGroup>(pairs, 0, options, sampler);
    ctrlora::LayerGroup::connect(group);
  }
  [[nodiscard]] at::Tensor state(const std::string& name) const {
    for (const auto& [own, tensor] : group->named_tensors()) {
      if (own == name) {
        return tensor;
      }
    }
    FAIL("no state named " << name);
    return {};
  }
  void random_gradients() {
    for (ctrlora::LoraPair& pair : pairs) {
      pair.a.mutable_grad() = problems::randn(pair.a.sizes(), pair.a.scalar_type());
      pair.b.mutable_grad() = problems::randn(pair.b.sizes(), pair.b.scalar_type());
    }
  }
  void observe(int64_t layer, const at::Tensor& x, const at::Tensor& g, const at::Tensor& y = {}) {
    slots[static_cast<size_t>(layer)]->capture(x, y)->complete(g);
  }
  void step(const ctrlora::GroupSettings& settings = {}) {
    group->bind();
    group->update_momentum();
    ctrlora::LayerGroup::commit_observations({group.get()}, side);
    group->apply(propose(*group, options, settings), at::ones({1}, at::kDouble), settings);
    group->finish();
  }
  static ctrlora::Proposal propose(ctrlora::LayerGroup& group,
                                   const ctrlora::Options& options,
                                   const ctrlora::GroupSettings& settings = {}) {
    if (const auto gradients = group.measure_gradients()) {
      group.update_rms(ctrlora::direction_square(*gradients, options));
    }
    return ctrlora::propose(group.measure(settings), options);
  }
};

/// Bases of full size: every factor is exact.
inline ctrlora::Options exact() {
  ctrlora::Options options;
  ctrlora::SideStream side;
  options.sketch_rank = 64;
  return options;
}

inline at::Tensor outer(const at::Tensor& rows) {
  return at::matmul(rows.t(), rows);
}

}  // namespace layer_model
