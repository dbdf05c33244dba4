#include "ctrlora/radius_control.h"

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "engine_model.h"

namespace {

using ctrlora::GroupSettings;
using ctrlora::Options;
using ctrlora::RadiusControl;
using ctrlora::StepVerdict;
using problems::copy_of;
using problems::error;
using problems::error_of;
using problems::Model;
using problems::same;
using problems::same_bits;
using problems::State;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

}  // namespace

TEST_CASE("a poor ratio halves the radii, a good one grows them by half, both within bounds") {
  for (const auto& [actual, factor] : std::vector<std::pair<double, double>>{
           {0.0, 0.5}, {0.24, 0.5}, {0.26, 1.0}, {0.74, 1.0}, {0.76, 1.5}, {3.0, 1.5}}) {
    RadiusControl own;
    CHECK(own.propose(5.0, 5.0 - 2 * actual, 2.0) == StepVerdict::kAccept);
    CHECK(own.factor == factor);
    CHECK(own.ratio == doctest::Approx(actual));
  }
  RadiusControl up, down;
  for (int i = 0; i < 40; ++i) {
    up.propose(1.0, 0.0, 1.0);
    down.propose(1.0, 1.0, 1.0);
  }
  CHECK(up.factor == RadiusControl::kLargest);
  CHECK(down.factor == RadiusControl::kSmallest);
  CHECK(down.rejected == 0);
}

TEST_CASE("numerator and denominator are smoothed one by one") {
  RadiusControl own;
  own.propose(1.0, 0.5, 1.0);   // 0.5 / 1
  own.propose(1.0, 0.9, 10.0);  // (0.25 + 0.1) / (0.5 + 10)
  CHECK(own.ratio == doctest::Approx(0.35 / 10.5));
  own.propose(1.0, 1.01, 0.1);  // the smoothed sum is still positive: no rejection
  CHECK(own.rejected == 0);
}

TEST_CASE("a smoothed ratio below 0 rejects and starts anew; at the smallest radius it stands") {
  RadiusControl own;
  own.propose(1.0, 0.5, 1.0);
  CHECK(own.propose(1.0, 2.0, 1.0) == StepVerdict::kReject);
  CHECK(own.factor == 0.5);
  CHECK(own.rejected == 1);
  CHECK(own.actual == 0.0);
  CHECK(own.predicted == 0.0);
  CHECK(own.propose(1.0, 0.5, 1.0) == StepVerdict::kAccept);
  own.factor = RadiusControl::kSmallest;
  CHECK(own.propose(1.0, 9.0, 1.0) == StepVerdict::kAccept);
  CHECK(own.propose(1.0, kInf, 1.0) == StepVerdict::kReject);
}

TEST_CASE("what tells nothing changes no radius; a loss that explodes is rejected") {
  RadiusControl own;
  for (const auto& [before, after, predicted] : {std::array<double, 3>{kNan, 1.0, 1.0},
                                                 {kInf, 1.0, 1.0},
                                                 {1.0, 0.5, kNan},
                                                 {1.0, 0.5, 0.0},
                                                 {1.0, 0.5, -1.0}}) {
    RadiusControl fresh;
    CHECK(fresh.propose(before, after, predicted) == StepVerdict::kInvalid);
    CHECK(fresh.factor == 1.0);
    CHECK(std::isnan(fresh.ratio));
  }
  CHECK(own.propose(1.0, kNan, 1.0) == StepVerdict::kReject);
  CHECK(own.propose(1.0, kInf, 1.0) == StepVerdict::kReject);
  CHECK(own.factor == 0.25);
}

TEST_CASE("a rejected step leaves parameters and state bit for bit, but for the radii") {
  at::manual_seed(20);
  Options options;
  options.ratio_every = 1;
  Model own(4, options);
  const at::Tensor head = problems::randn({3}).requires_grad_();
  own.engine.add_fallback({head}, 0);
  for (int step = 0; step < 9; ++step) {
    own.backward();
    head.mutable_grad() = problems::randn({3});
    CHECK(own.engine.ratio_due());
    const State before = copy_of(own.engine);
    const std::vector<at::Tensor> parameters = own.parameters();
    const at::Tensor head_before = head.detach().clone();
    own.engine.begin_trial();
    own.engine.step({GroupSettings{}});
    const bool bad = step % 3 == 1;
    const StepVerdict verdict = own.engine.end_trial(1.0, bad ? kNan : 0.5);
    CHECK((verdict == StepVerdict::kReject) == bad);
    State after = copy_of(own.engine);
    CHECK_FALSE(same(after, before));
    after["radius"] = before.at("radius");
    CHECK(same(after, before) == bad);
    for (size_t i = 0; i < parameters.size(); ++i) {
      CHECK(same_bits(own.parameters()[i], parameters[i]) == bad);
    }
    CHECK(same_bits(head.detach(), head_before) == bad);
  }
  CHECK(own.engine.steps() == 6);
  CHECK(own.engine.metrics().at("rejected") == 3.0);
}

TEST_CASE("the predicted decrease is that of all gradients along the move") {
  at::manual_seed(21);
  Options options;
  options.ratio_every = 1;
  options.curvature_decay = 0.1;
  Model own(3, options);
  const at::Tensor head = problems::randn({3}).requires_grad_();
  own.engine.add_fallback({head}, 0);
  for (int step = 0; step < 3; ++step) {  // the first one ends in a balancing of the gauge
    own.backward();
    own.pairs[1].a.mutable_grad().select(0, 0).fill_(kNan);  // this layer stands still
    head.mutable_grad() = problems::randn({3});
    std::vector<at::Tensor> before, products;
    for (const auto& pair : own.pairs) {
      before.push_back(pair.a.detach().clone());
      before.push_back(pair.b.detach().clone());
    }
    const at::Tensor head_before = head.detach().clone();
    const at::Tensor old = own.state("radius").clone();
    own.engine.begin_trial();
    own.engine.step({GroupSettings{.weight_decay = 0.1}});
    double expected = -(head.grad() * (head.detach() - head_before)).sum().item<double>();
    for (const size_t l : {size_t{0}, size_t{2}}) {
      const auto& pair = own.pairs[l];
      expected -= (pair.a.grad() * (pair.a.detach() - before[2 * l])).sum().item<double>();
      expected -= (pair.b.grad() * (pair.b.detach() - before[2 * l + 1])).sum().item<double>();
    }
    own.engine.end_trial(1.0, 0.99);
    const double got = (own.state("radius")[2] - 0.5 * old[2]).item<double>();
    CHECK((step == 0 || got == doctest::Approx(expected).epsilon(1e-10)));
  }
}

TEST_CASE("the factor scales both balls") {
  for (const double kl_radius : {kInf, 1e-6}) {
    for (const double factor : {1.0, 0.5}) {
      at::manual_seed(22);
      Options options;
      options.kl_radius = kl_radius;
      options.step_length = "radius";
      options.ratio_every = 1;
      Model own(3, options);
      State state = copy_of(own.engine);
      state["radius"].select(0, 0).fill_(factor);
      own.engine.load(state);
      own.backward();
      own.engine.step({GroupSettings{}});
      const auto metrics = own.engine.metrics();
      CHECK(metrics.at("radius_factor") == factor);
      if (std::isinf(kl_radius)) {
        CHECK(metrics.at("output_change_max") == doctest::Approx(0.1 * factor).epsilon(1e-6));
      } else {
        CHECK(metrics.at("kl_radius") == doctest::Approx(kl_radius * factor * factor));
      }
    }
  }
}

TEST_CASE("checks fall on every ratio_every-th step; none without a trial") {
  at::manual_seed(23);
  Options options;
  Model never(1, options);
  CHECK_FALSE(never.engine.ratio_due());
  CHECK(never.engine.metrics().count("ratio") == 0);
  options.ratio_every = 3;
  Model own(1, options);
  for (int step = 1; step <= 7; ++step) {
    CHECK(own.engine.ratio_due() == (step % 3 == 0));
    own.backward();
    own.engine.step({GroupSettings{}});
  }
  CHECK(problems::contains(error_of([&] { own.engine.end_trial(1.0, 0.5); }), "begin_trial()"));
}
