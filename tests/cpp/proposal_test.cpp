#include "ctrlora/proposal.h"

#include <vector>

#include "problems.h"

namespace {

using at::matmul;
using ctrlora::Measurement;
using ctrlora::Options;
using ctrlora::Proposal;
using ctrlora::SideMetric;
using problems::dense;
using problems::error;
using problems::numbers;
using problems::randn;
using problems::same_bits;

constexpr int64_t kRank = 2;
constexpr int64_t kSketch = 3;

/// Layers of one shape with everything that a step knows of them.
struct Layers {
  at::Tensor a, b, momentum_a, momentum_b;
  ctrlora::LowRankEigen omega, s;
  Measurement measured;

  static ctrlora::LowRankEigen factor(int64_t layers, int64_t size) {
    ctrlora::LowRankEigen out(layers, size, kSketch, at::TensorOptions(at::kDouble));
    const at::Tensor rows = problems::rows_of(problems::positive(layers, size), 50);
    out.start_basis(rows, at::ones({layers}, at::kBool), 1);
    const at::Tensor weights = at::ones({layers, 50}, at::kDouble);
    for (int i = 0; i < 3; ++i) {
      out.update(out.sketch(rows, weights), at::zeros({layers}, at::kDouble),
                 at::ones({layers}, at::kDouble));
    }
    return out;
  }

  Layers(int64_t layers, int64_t m, int64_t n)
      : a(randn({layers, kRank, n})),
        b(randn({layers, m, kRank})),
        momentum_a(randn({layers, kRank, n})),
        momentum_b(randn({layers, m, kRank})),
        omega(factor(layers, n)),
        s(factor(layers, m)) {
    measured.input = ctrlora::side_products(a.mT(), momentum_a.mT(), omega.basis());
    measured.output = ctrlora::side_products(b, momentum_b, s.basis());
    measured.input_metric = SideMetric::of(omega, 0.5, 0.01);
    measured.output_metric = SideMetric::of(s, 0.5, 0.01);
    measured.scaling = at::rand({layers}, at::kDouble) + 0.5;
    measured.momentum_factor = -(at::rand({layers}, at::kDouble) + 0.5);
    measured.radius = at::rand({layers}, at::kDouble) + 0.1;
    measured.direction_rms = at::rand({layers}, at::kDouble) + 0.1;
    measured.live = at::ones({layers}, at::kBool);
    measured.absolute = at::ones({layers}, at::kBool);
    measured.isotropic = at::rand({layers}, at::kDouble);
    measured.rounding = 1e-16;
  }

  /// D(f) of every layer, dense.
  [[nodiscard]] at::Tensor change(const Proposal& own, const at::Tensor& f) const {
    const at::Tensor factor = measured.momentum_factor.view({-1, 1, 1}), t = f.view({-1, 1, 1});
    const at::Tensor da =
        own.step.a.materialize(a.mT(), momentum_a.mT() * factor, omega.basis()).mT();
    const at::Tensor db = own.step.b.materialize(b, momentum_b * factor, s.basis());
    return (matmul(b + t * db, a + t * da) - matmul(b, a)) * measured.scaling.view({-1, 1, 1});
  }
};

at::Tensor square(const at::Tensor& left, const at::Tensor& change, const at::Tensor& right) {
  return (matmul(left, change) * matmul(change, right)).sum({1, 2});
}

}  // namespace

TEST_CASE("the proposal ends inside the output ball and predicts both norms of the true change") {
  at::manual_seed(0);
  const Layers own(6, 8, 7);
  const Proposal got = ctrlora::propose(own.measured, {});
  REQUIRE(got.ok.all().item<bool>());
  const at::Tensor change = own.change(got, got.length), half = own.change(got, got.length * 0.5);
  const at::Tensor omega = dense(own.omega), s = dense(own.s), eye = at::eye(8, at::kDouble);
  const at::Tensor sizes = square(eye, change, omega);
  CHECK(error(got.output_norm(got.length), sizes) < 1e-10);
  CHECK(error(got.fisher_norm(got.length), square(s, change, omega)) < 1e-10);
  CHECK(error(got.fisher_norm(got.length * 0.5), square(s, half, omega)) < 1e-10);
  CHECK((sizes.sqrt() <= own.measured.radius * (1 + 1e-8)).all().item<bool>());
  const at::Tensor planned = own.measured.radius / own.measured.direction_rms;
  CHECK((got.length <= planned).all().item<bool>());
  CHECK((got.length < planned).any().item<bool>());  // the ball did bind somewhere
}

TEST_CASE("step_length \"radius\" fills the ball up to the cross term") {
  at::manual_seed(1);
  Layers own(4, 8, 7);
  own.measured.radius = at::full({4}, 1e-4, at::kDouble);  // so small that there is none
  Options options;
  options.step_length = "radius";
  const Proposal got = ctrlora::propose(own.measured, options);
  CHECK(error(got.output_norm(got.length).sqrt(), own.measured.radius) < 1e-3);
}

TEST_CASE("step_length \"newton\" is the minimum of the model along the step, inside the ball") {
  at::manual_seed(5);
  Layers own(5, 8, 7);
  own.measured.radius = numbers({1e6, 1e6, 1e6, 1e-4, 1e-4});
  own.measured.absolute = numbers({1, 1, 1, 1, 0}) > 0;
  Options options;
  options.step_length = "newton";
  const Proposal got = ctrlora::propose(own.measured, options);
  REQUIRE(got.ok.all().item<bool>());
  const at::Tensor factor = own.measured.momentum_factor.view({-1, 1, 1});
  const at::Tensor ma = own.momentum_a * factor, mb = own.momentum_b * factor;
  const at::Tensor da = got.step.a.materialize(own.a.mT(), ma.mT(), own.omega.basis()).mT();
  const at::Tensor db = got.step.b.materialize(own.b, mb, own.s.basis());
  const at::Tensor tangent =
      (matmul(own.b, da) + matmul(db, own.a)) * own.measured.scaling.view({-1, 1, 1});
  const at::Tensor slope = (ma * da).sum({1, 2}) + (mb * db).sum({1, 2});
  const at::Tensor newton = -slope / square(dense(own.s), tangent, dense(own.omega));
  CHECK(error(got.length.slice(0, 0, 3), newton.slice(0, 0, 3)) < 1e-9);
  // The radius where it is smaller, and where there is no curvature to go by.
  CHECK(error(got.output_norm(got.length).sqrt().slice(0, 3), own.measured.radius.slice(0, 3)) <
        1e-3);
}

TEST_CASE("layers of two widths below each other get what they get alone") {
  at::manual_seed(2);
  const Layers first(3, 8, 7), second(2, 5, 11);
  const Proposal both = ctrlora::propose(Measurement::cat({first.measured, second.measured}), {});
  int64_t begin = 0;
  for (const Layers* own : {&first, &second}) {
    const Proposal alone = ctrlora::propose(own->measured, {});
    const int64_t end = begin + own->a.size(0);
    const Proposal part = both.slice(begin, end);
    CHECK(error(part.step.a.momentum, alone.step.a.momentum) < 1e-14);
    CHECK(error(part.step.b.basis, alone.step.b.basis) < 1e-14);
    CHECK(error(part.step.b.weight, alone.step.b.weight) < 1e-14);
    CHECK(error(part.step.predicted_decrease, alone.step.predicted_decrease) < 1e-14);
    CHECK(error(part.length, alone.length) < 1e-14);
    CHECK(error(part.fisher_norm.c4, alone.fisher_norm.c4) < 1e-12);
    CHECK(error(part.input_grams.dd, alone.input_grams.dd) < 1e-12);
    CHECK(same_bits(part.ok, alone.ok));
    begin = end;
  }
}

TEST_CASE("a layer without a gradient, without a size yet, or with bad numbers stays where it is") {
  at::manual_seed(3);
  Layers own(6, 8, 7);
  own.measured.live.select(0, 1).fill_(false);
  own.measured.direction_rms.select(0, 2).fill_(0.0);
  own.measured.input.mm.select(0, 3).fill_(std::numeric_limits<double>::quiet_NaN());
  own.measured.absolute.select(0, 4).fill_(false);
  own.measured.input.mm.select(0, 5).fill_(std::numeric_limits<double>::infinity());
  const Proposal got = ctrlora::propose(own.measured, {});
  CHECK(same_bits(got.ok, numbers({1, 0, 0, 0, 1, 0}) > 0));
  CHECK(same_bits(got.length > 0, got.ok));
  // What decays, what counts as a miss.
  CHECK(same_bits(got.sound, numbers({1, 1, 1, 0, 1, 0}) > 0));
  CHECK_FALSE(got.spike[1].item<bool>());
  CHECK(got.spike[3].item<bool>());  // a momentum that nobody can measure is forgotten
  CHECK(got.spike[5].item<bool>());
  CHECK(got.fisher_norm.c2[4].item<double>() == 0.0);
  CHECK(got.fisher_norm.c2[0].item<double>() > 0.0);
}

TEST_CASE("the direction's square is that of the tangent step") {
  at::manual_seed(4);
  const Layers own(4, 8, 7);
  const ctrlora::DirectionSquare got = ctrlora::direction_square(own.measured, {});
  const Proposal step = ctrlora::propose(own.measured, {});
  CHECK(got.ok.all().item<bool>());
  CHECK(error(got.square, step.output_norm.c2) < 1e-14);
  const at::Tensor tiny = at::full({4}, 1e-7, at::kDouble);
  CHECK(error(square(at::eye(8, at::kDouble), own.change(step, tiny), dense(own.omega)) * 1e14,
              got.square) < 1e-5);
}
