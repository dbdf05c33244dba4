// Decay by curvature: cpp/README.md, section 4.
#include <algorithm>
#include <memory>
#include <vector>

#include "layer_model.h"

namespace {

using at::matmul;
using ctrlora::GroupSettings;
using ctrlora::Options;
using layer_model::Layers;
using layer_model::outer;
using problems::dense;
using problems::dense_power;
using problems::error;
using problems::randn;
using problems::same_bits;

/// Steps with observations, so that no factor is the identity.
void warm_up(Layers& own, int steps) {
  for (int t = 0; t < steps; ++t) {
    own.random_gradients();
    for (int64_t l = 0; l < own.group->layers(); ++l) {
      own.observe(l, randn({30, layer_model::kIn}), randn({30, layer_model::kOut}));
    }
    own.step({.weight_decay = 0.3});
  }
}

struct Dense {
  at::Tensor a, b, decay_a, decay_b;  // (L, ., .), gradients of 1/2 s^2 tr(PQ)
};

/// The gradients by autograd through dense factors.
Dense dense_decay(const Layers& own) {
  const auto& options = own.options;
  const at::Tensor omega =
      dense_power(dense(own.group->factors().input), options.whitening, options.damping);
  const at::Tensor s =
      dense_power(dense(own.group->factors().output), options.whitening, options.damping);
  std::vector<at::Tensor> a, b;
  for (const auto& pair : own.pairs) {
    a.push_back(pair.a.detach());
    b.push_back(pair.b.detach());
  }
  Dense out{at::stack(a).requires_grad_(), at::stack(b).requires_grad_(), {}, {}};
  const at::Tensor p = matmul(out.b.mT(), matmul(s, out.b));
  const at::Tensor q = matmul(out.a, matmul(omega, out.a.mT()));
  const double scaling = own.pairs.front().scaling;
  (0.5 * scaling * scaling * (p * q.mT()).sum()).backward();
  out.decay_a = out.a.grad();
  out.decay_b = out.b.grad();
  return out;
}

}  // namespace

TEST_CASE("curvature decay adds the gradient of 1/2 s^2 tr(PQ), decoupled from the step") {
  for (const double whitening : {0.0, 0.5, 1.0}) {
    for (const int64_t sketch_rank : {2, 64}) {
      at::manual_seed(3);
      Options options;
      options.whitening = whitening;
      options.sketch_rank = sketch_rank;
      options.curvature_decay = 1e-5;  // so weak that it is not cut
      Layers own(3, options);
      warm_up(own, 3);
      own.random_gradients();
      own.group->update_momentum();
      ctrlora::LayerGroup::commit_observations({own.group.get()}, own.side);
      const Dense truth = dense_decay(own);
      const GroupSettings settings{.lr = 0.2, .weight_decay = 0.1};
      const ctrlora::Proposal proposal = Layers::propose(*own.group, options, settings);
      own.group->apply(proposal, at::zeros({1}, at::kDouble), settings);  // no step, decays alone
      for (int64_t l = 0; l < 3; ++l) {
        const auto& pair = own.pairs[static_cast<size_t>(l)];
        CAPTURE(whitening);
        CAPTURE(sketch_rank);
        const auto moved = [&](const at::Tensor& now, const at::Tensor& before) {
          return now.detach() - 0.98 * before.detach()[l];
        };
        CHECK(error(moved(pair.a, truth.a), -0.2e-5 * truth.decay_a[l]) < 1e-9);
        CHECK(error(moved(pair.b, truth.b), -0.2e-5 * truth.decay_b[l]) < 1e-9);
      }
    }
  }
}

TEST_CASE("carried Grams hold under curvature decay") {
  at::manual_seed(12);
  Options options;
  options.sketch_rank = 3;
  options.factor_every = 1000;
  options.curvature_decay = 5e-3;
  Layers own(20, options);
  warm_up(own, 2);
  for (int64_t t = 0; t < 12; ++t) {
    own.random_gradients();
    own.step({.weight_decay = 0.3});
    for (size_t l = 0; l < own.pairs.size(); ++l) {
      const at::Tensor a = own.pairs[l].a.detach(), b = own.pairs[l].b.detach();
      const auto layer = static_cast<int64_t>(l);
      const at::Tensor u = own.group->factors().input.basis()[layer];
      const at::Tensor v = own.group->factors().output.basis()[layer];
      CHECK(error(own.state("input.ww")[layer], outer(a.t())) < 1e-12);
      CHECK(error(own.state("output.ww")[layer], outer(b)) < 1e-12);
      CHECK(error(own.state("input.uw")[layer], matmul(u.t(), a.t())) < 1e-12);
      CHECK(error(own.state("output.uw")[layer], matmul(v.t(), b)) < 1e-12);
    }
  }
}

TEST_CASE("curvature decay of any strength takes nothing past zero; idle layers do not decay") {
  at::manual_seed(13);
  Options options;
  options.curvature_decay = 1e12;
  options.beta1 = 0.0;
  Layers own(2, options);
  warm_up(own, 1);
  for (int t = 0; t < 20; ++t) {
    for (auto& pair : own.pairs) {
      pair.a.mutable_grad() = at::zeros_like(pair.a);
      pair.b.mutable_grad() = at::zeros_like(pair.b);
    }
    own.pairs[1].a.mutable_grad().reset();  // half a pair has no step
    const double before = own.pairs[0].b.detach().norm().item<double>();
    const at::Tensor idle = own.pairs[1].b.detach().clone();
    own.step({});
    CHECK(own.pairs[0].b.detach().norm().item<double>() <= before * (1 + 1e-12));
    CHECK(same_bits(own.pairs[1].b.detach(), idle));
  }
}
