// Layers of one shape under an engine, fed with random gradients: what the engine's tests share.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ctrlora/engine.h"
#include "ctrlora/observation.h"
#include "problems.h"

namespace problems {

using State = std::map<std::string, at::Tensor>;

inline State copy_of(const ctrlora::Engine& engine) {
  State out;
  for (const auto& [name, tensor] : engine.named_tensors()) {
    out[name] = tensor.clone();
  }
  return out;
}

inline bool same(const State& x, const State& y) {
  return x.size() == y.size() &&
         std::equal(x.begin(), x.end(), y.begin(), [](const auto& own, const auto& other) {
           return own.first == other.first && same_bits(own.second, other.second);
         });
}

struct Model {
  static constexpr int64_t kIn = 6, kOut = 5, kRank = 2;
  std::vector<ctrlora::LoraPair> pairs;
  std::vector<std::shared_ptr<ctrlora::ObservationSlot>> slots;
  ctrlora::Engine engine;

  explicit Model(int64_t layers,
                 const ctrlora::Options& options = {},
                 bool trained = true,
                 at::ScalarType dtype = at::kDouble)
      : engine(options) {
    for (int64_t l = 0; l < layers; ++l) {
      pairs.push_back(make_pair(kOut, kIn, kRank, trained, dtype));
      pairs.back().name = "layer " + std::to_string(l);
      slots.push_back(ctrlora::register_pair(pairs.back()));
    }
    engine.add_pairs(pairs, 0);
  }
  void random_gradients() {
    for (const ctrlora::LoraPair& pair : pairs) {
      pair.a.mutable_grad() = randn(pair.a.sizes(), pair.a.scalar_type());
      pair.b.mutable_grad() = randn(pair.b.sizes(), pair.b.scalar_type());
    }
  }
  /// Gradients, and observations of the layers that the engine wants; 0 and 1 share their input.
  void backward(double loss_scale = 1.0) {
    random_gradients();
    const at::Tensor shared = randn({30, kIn});
    for (size_t l = 0; l < pairs.size(); ++l) {
      const at::Tensor x = l < 2 ? shared : randn({30, kIn});
      const at::Tensor g = randn({30, kOut}), y = randn({30, kOut});
      if (slots[l]->wanted()) {
        slots[l]->capture(x, y)->complete(g * loss_scale);
      }
    }
  }
  /// Copies of a and b of all layers in turn.
  [[nodiscard]] std::vector<at::Tensor> parameters() const {
    std::vector<at::Tensor> out;
    for (const ctrlora::LoraPair& pair : pairs) {
      out.push_back(pair.a.detach().clone());
      out.push_back(pair.b.detach().clone());
    }
    return out;
  }
  /// The live tensor of that name.
  [[nodiscard]] at::Tensor state(const std::string& name) const {
    for (const auto& [own, tensor] : engine.named_tensors()) {
      if (own == name) {
        return tensor;
      }
    }
    FAIL("no state named " << name);
    return {};
  }
};

/// Collects torch's warnings while it lives.
struct Warnings : c10::WarningHandler {
  void process(const c10::Warning& warning) override { text += warning.msg(); }
  std::string text;
  c10::WarningUtils::WarningHandlerGuard guard{this};
};

/// AdamW (Loshchilov & Hutter 2019, algorithm 2) in float64 at step t, counted from 1.
inline void adamw(at::Tensor& p,
                  at::Tensor& m,
                  at::Tensor& v,
                  const at::Tensor& g,
                  int t,
                  const ctrlora::GroupSettings& own) {
  m = own.beta1 * m + (1 - own.beta1) * g;
  v = own.beta2 * v + (1 - own.beta2) * g * g;
  const at::Tensor scaled = m / (1 - std::pow(own.beta1, t));
  const at::Tensor square = v / (1 - std::pow(own.beta2, t));
  p = p - own.lr * own.weight_decay * p - own.lr * scaled / (square.sqrt() + own.eps);
}

}  // namespace problems
