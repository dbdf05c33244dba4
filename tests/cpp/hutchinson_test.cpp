#include "ctrlora/hutchinson.h"

#include <ATen/core/grad_mode.h>

#include <cmath>
#include <limits>
#include <vector>

#include "engine_model.h"

namespace {

using at::matmul;
using ctrlora::GroupSettings;
using ctrlora::HutchinsonProbe;
using ctrlora::LoraPair;
using ctrlora::Options;
using problems::error;
using problems::error_of;
using problems::Model;
using problems::numbers;
using problems::randn;
using problems::same_bits;

/// Two layers in a row with a smooth loss that couples them.
struct Chain {
  std::vector<LoraPair> pairs = {problems::make_pair(5, 4, 2), problems::make_pair(3, 5, 2)};
  at::Tensor x = randn({7, 4}), y = randn({7, 3});

  [[nodiscard]] at::Tensor loss(const std::vector<at::Tensor>& p) const {
    const auto layer = [&](const at::Tensor& in, size_t l) {
      return matmul(matmul(in, p[2 * l].t()), p[2 * l + 1].t()) * pairs[l].scaling;
    };
    return (layer(layer(x, 0).tanh(), 1) - y).square().sum(-1).mean();
  }
  [[nodiscard]] std::vector<at::Tensor> params() const {
    return {pairs[0].a, pairs[0].b, pairs[1].a, pairs[1].b};
  }
};

/// v_l . (H v)_l by the second difference of the loss along v and v with layer l reversed:
/// no gradient of anything.
double from_losses(const Chain& own, const HutchinsonProbe& probe, int64_t layer) {
  const at::NoGradGuard guard;
  std::vector<at::Tensor> v;
  for (int64_t l = 0; l < 2; ++l) {
    v.push_back(probe.direction_a(l));
    v.push_back(probe.direction_b(l));
  }
  // v_l H v = ((v H v) - (w H w) + 4 v_l H v_l) / 4 + ... with w = v but -v_l; solved below.
  const auto curvature = [&](double scale_layer, double scale_other) {
    const double h = 1e-4;
    const auto at_point = [&](double t) {
      std::vector<at::Tensor> p = own.params();
      for (size_t i = 0; i < p.size(); ++i) {
        const bool of_layer = static_cast<int64_t>(i / 2) == layer;
        p[i] = p[i].detach() + t * (of_layer ? scale_layer : scale_other) * v[i];
      }
      return own.loss(p).item<double>();
    };
    return (at_point(h) - 2 * at_point(0) + at_point(-h)) / (h * h);
  };
  // (v_l + v_o) H (v_l + v_o) = ll + 2 lo + oo;  (v_l - v_o): ll - 2 lo + oo;  v_l alone: ll.
  return curvature(1, 0) + (curvature(1, 1) - curvature(1, -1)) / 4;
}

}  // namespace

TEST_CASE("c_l = v_l . (H v)_l, by finite differences and by double backward") {
  at::manual_seed(30);
  const Chain own;
  HutchinsonProbe probe(own.pairs, 1, 2);
  for (const int64_t sign : {1, -1}) {
    probe.shift(sign);
    own.loss(own.params()).backward();
    probe.take();
  }
  probe.restore();
  HutchinsonProbe exact(own.pairs, 1, 2);
  exact.differentiate(own.loss(own.params()));
  CHECK(same_bits(exact.direction_b(1), probe.direction_b(1)));
  CHECK(error(probe.traces(), exact.traces()) < 1e-7);
  const at::Tensor truth = numbers({from_losses(own, probe, 0), from_losses(own, probe, 1)});
  CHECK(error(exact.traces(), truth) < 1e-4);
}

TEST_CASE("the mean over probes is the trace of each layer's own block") {
  at::manual_seed(31);
  const Chain own;
  at::Tensor mean = at::zeros({2}, at::kDouble);
  const int64_t probes = 600;
  for (int64_t i = 0; i < probes; ++i) {
    HutchinsonProbe probe(own.pairs, 3, static_cast<uint64_t>(i));
    CHECK((i > 0 || (probe.direction_a(0).abs() == 1).all().item<bool>()));
    probe.differentiate(own.loss(own.params()));
    mean += probe.traces() / static_cast<double>(probes);
  }
  // The diagonal of the Hessian, entry by entry, from the loss alone.
  std::vector<double> truth(2, 0.0);
  const at::NoGradGuard guard;
  for (size_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < own.params()[i].numel(); ++j) {
      const auto at_point = [&](double t) {
        std::vector<at::Tensor> p = own.params();
        p[i] = p[i].detach().clone();
        p[i].view({-1})[j] += t;
        return own.loss(p).item<double>();
      };
      truth[i / 2] += (at_point(1e-4) - 2 * at_point(0) + at_point(-1e-4)) * 1e8;
    }
  }
  CHECK(error(mean, numbers({truth[0], truth[1]})) < 0.15);
}

TEST_CASE("a probe leaves parameters and gradients bit for bit") {
  at::manual_seed(32);
  const Chain own;
  own.loss(own.params()).backward();
  std::vector<at::Tensor> params, grads;
  for (const at::Tensor& p : own.params()) {
    params.push_back(p.detach().clone());
    grads.push_back(p.grad().clone());
  }
  {
    HutchinsonProbe probe(own.pairs, 0, 0);
    probe.shift(1);
    CHECK_FALSE(same_bits(own.pairs[0].a.detach(), params[0]));
    CHECK_FALSE(own.pairs[0].a.grad().defined());
    own.loss(own.params()).backward();
    probe.take();
    CHECK(problems::contains(error_of([&] { probe.take(); }), "expected shift() before take()"));
  }  // restores at the end of its life
  for (size_t i = 0; i < params.size(); ++i) {
    CHECK(same_bits(own.params()[i].detach(), params[i]));
    CHECK(same_bits(own.params()[i].grad(), grads[i]));
  }
}

TEST_CASE("the engine averages c and compares it with the factors' own") {
  at::manual_seed(33);
  Options options;
  options.sketch_rank = 64;
  Model own(2, options);
  for (int i = 0; i < 3; ++i) {
    own.backward();
    own.engine.step({GroupSettings{}});
  }
  const auto unit = [&](size_t l) {
    const LoraPair& pair = own.pairs[l];
    const double s2 = pair.scaling * pair.scaling;
    return s2 * (Model::kIn * pair.b.detach().square().sum().item<double>() +
                 Model::kOut * pair.a.detach().square().sum().item<double>());
  };
  CHECK(std::isnan(own.engine.curvature().at("layer 0").first));
  own.engine.enter_traces({{"layer 0", 3.0}});
  const double first = 3.0 / unit(0);
  CHECK(own.engine.curvature().at("layer 0").first == doctest::Approx(first));
  CHECK(std::isnan(own.engine.curvature().at("layer 1").first));
  own.engine.enter_traces({{"layer 0", 6.0}});
  const double beta = Options().factor_beta;
  const double mean = (beta * first + 6.0 / unit(0)) / (1 + beta);
  CHECK(own.engine.curvature().at("layer 0").first == doctest::Approx(mean));
  for (size_t l = 0; l < 2; ++l) {  // tr(S (x) Omega) over the parameters of A and of B
    const at::Tensor u = own.state("group0.input.basis")[static_cast<int64_t>(l)];
    const at::Tensor v = own.state("group0.output.basis")[static_cast<int64_t>(l)];
    const at::Tensor omega =
        matmul(u * own.state("group0.input.eigenvalues")[static_cast<int64_t>(l)], u.t());
    const at::Tensor s =
        matmul(v * own.state("group0.output.eigenvalues")[static_cast<int64_t>(l)], v.t());
    const at::Tensor a = own.pairs[l].a.detach(), b = own.pairs[l].b.detach();
    const double s2 = own.pairs[l].scaling * own.pairs[l].scaling;
    const double expected = s2 * (matmul(b.t(), matmul(s, b)).trace() * omega.trace() +
                                  s.trace() * matmul(a, matmul(omega, a.t())).trace())
                                     .item<double>();
    CHECK(own.engine.curvature().at(own.pairs[l].name).second ==
          doctest::Approx(expected / unit(l)));
  }
}

TEST_CASE("curvature \"hutchinson\": no whitening, and the Fisher ball is c |D|^2 / 2") {
  std::vector<std::vector<at::Tensor>> moves;
  for (const bool isotropic : {false, true}) {
    at::manual_seed(34);
    Options options;
    options.whitening = isotropic ? 1.0 : 0.0;
    options.kl_radius = isotropic ? 1e300 : std::numeric_limits<double>::infinity();
    options.curvature = isotropic ? "hutchinson" : "kfac";
    options.hutchinson_every = isotropic ? 1 : 0;
    options.balance_every = 1000;
    Model own(2, options);
    own.backward();
    own.engine.step({GroupSettings{}});
    own.backward();
    own.engine.enter_traces({{"layer 0", 4.0}, {"layer 1", -2.0}});  // less than none is none
    const std::vector<at::Tensor> before = own.parameters();
    const double c = own.engine.curvature().at("layer 0").first;
    own.engine.step({GroupSettings{}});
    moves.push_back(own.parameters());
    if (isotropic) {
      const at::Tensor change =
          (matmul(moves[1][1], moves[1][0]) - matmul(before[1], before[0])) * own.pairs[0].scaling;
      CHECK(own.engine.metrics().at("predicted_kl") ==
            doctest::Approx(0.5 * c * change.square().sum().item<double>()).epsilon(1e-9));
    }
  }
  for (size_t i = 0; i < moves[0].size(); ++i) {
    CHECK(same_bits(moves[0][i], moves[1][i]));
  }
}

TEST_CASE("curvature \"gradient\" observes nothing") {
  at::manual_seed(35);
  Options options;
  options.curvature = "gradient";
  Model own(2, options);
  CHECK_FALSE(own.slots[0]->wanted());
  own.backward();
  own.engine.step({GroupSettings{}});
  CHECK_FALSE(own.slots[0]->wanted());
  CHECK_FALSE(own.state("group0.absolute").any().item<bool>());
  CHECK(own.state("group0.seen").min().item<double>() > 0);
}
