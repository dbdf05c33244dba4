#include "ctrlora/trust_region.h"

#include <cmath>
#include <limits>
#include <string>

#include "problems.h"

namespace {

using at::matmul;
using ctrlora::inside_ball;
using ctrlora::Quartic;
using ctrlora::StepGrams;
using ctrlora::TrustRegionSubproblem;
using problems::contains;
using problems::error;
using problems::numbers;
using problems::randn;
using problems::same_bits;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// |f T + f^2 Z|^2 with |T| = tangent, |Z| = cross and the cosine between them.
Quartic quartic(const at::Tensor& tangent, const at::Tensor& cross, const at::Tensor& cosine) {
  return {tangent.square(), 2 * cosine * tangent * cross, cross.square()};
}

at::Tensor uniform(int64_t count, double low, double high) {
  return low + (high - low) * at::rand({count}, at::kDouble);
}
at::Tensor powers_of_ten(int64_t count, double low, double high) {
  return at::pow(10.0, uniform(count, low, high));
}

/// The first f with norm(f) = radius^2, by 200 bisections of [0, high]; norm grows on the way.
at::Tensor first_crossing(const Quartic& norm, const at::Tensor& radius, const at::Tensor& high) {
  at::Tensor low = at::zeros_like(high), up = high;
  for (int i = 0; i < 200; ++i) {
    const at::Tensor middle = (low + up) / 2;
    const at::Tensor inside = norm(middle) <= radius.square();
    low = at::where(inside, middle, low);
    up = at::where(inside, up, middle);
  }
  return low;
}

struct Solved {
  TrustRegionSubproblem problem;
  TrustRegionSubproblem::Solution solution;
  at::Tensor curvature;  // (L, m, n)
  at::Tensor length;     // (L) |D|
};

Solved solve(const at::Tensor& gradient,
             const at::Tensor& output,
             const at::Tensor& input,
             const at::Tensor& radius) {
  const TrustRegionSubproblem problem{gradient, output, input};
  const auto solution = problem.solve(radius);
  return {problem, solution, output.unsqueeze(-1) * input.unsqueeze(1),
          solution.step.square().sum({1, 2}).sqrt()};
}

at::Tensor model(const Solved& own, const at::Tensor& step) {
  return (own.problem.gradient * step).sum({1, 2}) +
         0.5 * (own.curvature * step.square()).sum({1, 2});
}

/// The conditions of More & Sorensen (1983), theorem 3.2: necessary and sufficient.
void check_optimal(const Solved& own, const at::Tensor& radius, double tolerance) {
  const at::Tensor nu = own.solution.multiplier;
  CHECK((nu >= 0).all().item<bool>());
  const at::Tensor rest =
      (own.curvature + nu.view({-1, 1, 1})) * own.solution.step + own.problem.gradient;
  CHECK(rest.abs().max().item<double>() <=
        tolerance * own.problem.gradient.abs().max().item<double>());
  CHECK((own.length <= radius * (1 + tolerance)).all().item<bool>());
  const at::Tensor slack = at::where(nu > 0, (own.length / radius - 1).abs(), at::zeros_like(nu));
  CHECK(slack.max().item<double>() <= tolerance);
  CHECK(error(own.solution.model_decrease, -model(own, own.solution.step)) < 1e-12);
  CHECK((own.solution.model_decrease >= 0).all().item<bool>());
}

}  // namespace

TEST_CASE("the quartic is the squared norm of the true change of W, cross term included") {
  at::manual_seed(0);
  const at::Tensor a = randn({3, 2, 7}), b = randn({3, 9, 2}), s = numbers({0.5, 2.0, -3.0});
  const at::Tensor da = randn({3, 2, 7}), db = randn({3, 9, 2});
  const at::Tensor omega = problems::positive(3, 7), left = problems::positive(3, 9);
  const auto grams = [](const at::Tensor& metric, const at::Tensor& w, const at::Tensor& d) {
    return StepGrams{matmul(w.mT(), matmul(metric, w)), matmul(w.mT(), matmul(metric, d)),
                     matmul(d.mT(), matmul(metric, d))};
  };
  const Quartic norm = ctrlora::squared_norm(grams(omega, a.mT(), da.mT()), grams(left, b, db), s);
  for (const double f : {-1.0, 0.0, 0.3, 1.0, 4.0}) {
    const at::Tensor moved = matmul(b + f * db, a + f * da) - matmul(b, a);
    const at::Tensor change = moved * s.view({3, 1, 1});
    const at::Tensor expected =
        (matmul(change.mT(), matmul(left, change)) * omega).sum({1, 2});  // tr(D' N D Omega)
    CHECK(error(norm(at::full({3}, f, at::kDouble)), expected) < 1e-12);
  }
}

TEST_CASE("inside the ball the start is returned as it is; outside the step ends on the sphere") {
  at::manual_seed(1);
  constexpr int64_t kCount = 4000;
  // Where T and Z oppose each other more than this, the triangle inequality's bound may stand in.
  const Quartic norm = quartic(powers_of_ten(kCount, -4, 4), powers_of_ten(kCount, -4, 4),
                               uniform(kCount, -0.5, 1.0));
  const at::Tensor radius = powers_of_ten(kCount, -3, 3);
  const at::Tensor start = powers_of_ten(kCount, -4, 4);
  const at::Tensor f = inside_ball(norm, radius, start);
  const at::Tensor fits = norm(start) <= radius.square();
  CHECK(fits.sum().item<int64_t>() > kCount / 10);
  CHECK(fits.sum().item<int64_t>() < kCount * 9 / 10);
  CHECK(same_bits(at::where(fits, f, start), start));
  const at::Tensor ratio = norm(f).sqrt() / radius;
  CHECK((at::where(fits, at::ones_like(f), ratio) - 1).abs().max().item<double>() < 1e-9);
  CHECK((ratio <= 1 + 1e-9).all().item<bool>());
  CHECK((f <= start).all().item<bool>());
  const at::Tensor first = first_crossing(norm, radius, start);
  CHECK(((f - first).abs() / first).max().item<double>() < 1e-8);
}

TEST_CASE(
    "T and Z in opposition, where the norm may fall back on the way, never let the step leave the "
    "ball") {
  at::manual_seed(2);
  constexpr int64_t kCount = 4000;
  const at::Tensor tangent = powers_of_ten(kCount, -2, 2), cross = powers_of_ten(kCount, -2, 2);
  for (const double cosine : {-0.6, -0.8, -0.9, -0.95, -0.99, -1.0}) {
    const Quartic norm = quartic(tangent, cross, at::full({kCount}, cosine, at::kDouble));
    const at::Tensor radius = powers_of_ten(kCount, -2, 2), start = powers_of_ten(kCount, -2, 2);
    const at::Tensor f = inside_ball(norm, radius, start);
    CHECK((norm(f).sqrt() <= radius * (1 + 1e-9)).all().item<bool>());
    CHECK((f <= start).all().item<bool>());
    // No shorter than the triangle inequality allows.
    const at::Tensor bound =
        2 * radius / (tangent + (tangent.square() + 4 * cross * radius).sqrt());
    CHECK((f >= at::minimum(bound, start) * (1 - 1e-12)).all().item<bool>());
  }
}

TEST_CASE("a squared norm that rounding made negative counts as none") {
  const Quartic norm{problems::numbers({-1e-20}), problems::numbers({0.0}),
                     problems::numbers({1.0})};
  const at::Tensor f =
      ctrlora::inside_ball(norm, problems::numbers({0.25}), problems::numbers({1.0}));
  CHECK(problems::error(f, problems::numbers({0.5})) < 1e-9);  // f^4 = 1/16
}

TEST_CASE("no radius, no norm, no start and bad numbers") {
  const auto f = [](double c2, double c3, double c4, double radius, double start) {
    const Quartic norm{numbers({c2}), numbers({c3}), numbers({c4})};
    return inside_ball(norm, numbers({radius}), numbers({start})).item<double>();
  };
  CHECK(f(1.0, 0.5, 2.0, 0.0, 3.0) == 0.0);
  CHECK(f(0.0, 0.0, 0.0, 1.0, 3.0) == 3.0);
  CHECK(f(0.0, 0.0, 0.0, 0.0, 3.0) == 3.0);
  CHECK(f(1.0, 0.5, 2.0, 1.0, 0.0) == 0.0);
  CHECK(f(4.0, 0.0, 0.0, 1.0, 3.0) == doctest::Approx(0.5).epsilon(1e-12));
  CHECK(f(0.0, 0.0, 16.0, 1.0, 3.0) == doctest::Approx(0.5).epsilon(1e-12));
  CHECK(f(1e-300, 0.0, 0.0, 1.0, 3.0) == 3.0);
  // Rounding may leave a tiny negative coefficient.
  CHECK(f(1.0, 0.0, -1e-18, 0.5, 3.0) == doctest::Approx(0.5).epsilon(1e-9));

  const Quartic norm{numbers({kNan, 4.0}), numbers({0.0, 0.0}), numbers({0.0, 0.0})};
  CHECK(inside_ball(norm, numbers({1.0, 1.0}), numbers({3.0, 3.0}))[1].item<double>() ==
        doctest::Approx(0.5).epsilon(1e-12));
}

TEST_CASE("an interior solution is the Newton step") {
  at::manual_seed(3);
  const at::Tensor gradient = randn({2, 4, 3}), out = at::rand({2, 4}, at::kDouble) + 0.1;
  const at::Tensor in = at::rand({2, 3}, at::kDouble) + 0.1, radius = numbers({1e6, 1e9});
  const Solved own = solve(gradient, out, in, radius);
  CHECK(same_bits(own.solution.multiplier, at::zeros({2}, at::kDouble)));
  CHECK(same_bits(own.solution.iterations, at::zeros({2}, at::kLong)));
  CHECK(error(own.solution.step, -gradient / own.curvature) < 1e-14);
  check_optimal(own, radius, 1e-12);
}

TEST_CASE("a solution on the sphere satisfies the optimality conditions and beats every sample") {
  at::manual_seed(4);
  const at::Tensor gradient = randn({3, 4, 5}), radius = numbers({0.01, 0.3, 1.0});
  const Solved own = solve(gradient, at::rand({3, 4}, at::kDouble) + 0.01,
                           at::rand({3, 5}, at::kDouble) + 0.01, radius);
  check_optimal(own, radius, 1e-10);
  const at::Tensor best = model(own, own.solution.step);
  for (int trial = 0; trial < 2000; ++trial) {
    // Half of the samples anywhere in the ball, half near the solution.
    at::Tensor sample = randn({3, 4, 5});
    if (trial % 2 == 0) {
      sample = own.solution.step + sample * radius.view({3, 1, 1}) * 0.01;
    }
    const at::Tensor norm = sample.square().sum({1, 2}).sqrt();
    sample = sample * at::minimum(radius / norm, at::ones_like(norm)).view({3, 1, 1});
    REQUIRE((model(own, sample) >= best - 1e-12 * best.abs()).all().item<bool>());
  }
}

TEST_CASE("the multiplier equals that of a long bisection") {
  at::manual_seed(5);
  const at::Tensor gradient = randn({50, 4, 5}), radius = powers_of_ten(50, -3, 0);
  const Solved own = solve(gradient, powers_of_ten(200, -3, 1).view({50, 4}),
                           powers_of_ten(250, -3, 1).view({50, 5}), radius);
  at::Tensor low = at::zeros({50}, at::kDouble), high = at::full({50}, 1e6, at::kDouble);
  for (int i = 0; i < 300; ++i) {
    const at::Tensor nu = (low + high) / 2;
    const at::Tensor length =
        (gradient / (own.curvature + nu.view({50, 1, 1}))).square().sum({1, 2}).sqrt();
    low = at::where(length > radius, nu, low);
    high = at::where(length > radius, high, nu);
  }
  CHECK(((own.solution.multiplier - high).abs() / (high + 1e-9)).max().item<double>() < 1e-9);
}

TEST_CASE("Newton needs few iterations, also over many orders of magnitude") {
  at::manual_seed(6);
  const auto iterations = [](double spread) {
    const Solved own =
        solve(randn({200, 6, 7}), powers_of_ten(1200, -spread, spread).view({200, 6}),
              powers_of_ten(1400, -spread, spread).view({200, 7}), powers_of_ten(200, -4, 4));
    CHECK(own.solution.step.isfinite().all().item<bool>());
    return own.solution.iterations;
  };
  CHECK(iterations(0.5).max().item<int64_t>() <= 10);
  CHECK(iterations(2.0).max().item<int64_t>() <= 15);
  const at::Tensor hard = iterations(4.0);
  CHECK(hard.to(at::kDouble).mean().item<double>() <= 10.0);
  CHECK(hard.max().item<int64_t>() < 50);  // the limit is not what stops it
}

TEST_CASE("hard inputs: singular curvature, no gradient, tiny and huge radii") {
  at::manual_seed(7);
  const at::Tensor gradient = randn({4, 3, 3});
  const at::Tensor singular = numbers({0.0, 1e-12, 1.0}).expand({4, 3});
  const at::Tensor radius = numbers({1e-8, 1.0, 1e4, 1e8});
  check_optimal(solve(gradient, singular, singular, radius), radius, 1e-9);

  // The gradient has no part where the curvature is 0: an interior solution in spite of it.
  const at::Tensor inside = gradient * (singular.unsqueeze(-1) * singular.unsqueeze(1) > 1e-3);
  const Solved own = solve(inside, singular, singular, at::full({4}, 1e6, at::kDouble));
  CHECK(same_bits(own.solution.multiplier, at::zeros({4}, at::kDouble)));
  CHECK(error(own.solution.step, -inside) < 1e-14);

  const at::Tensor none = at::zeros({4, 3}, at::kDouble);
  const Solved flat = solve(gradient, none, none, radius);  // steepest descent to the sphere
  const at::Tensor norm = gradient.square().sum({1, 2}).sqrt();
  CHECK((flat.length / radius - 1).abs().max().item<double>() < 1e-11);
  CHECK(error(flat.solution.multiplier, norm / radius) < 1e-11);
  // Negative eigenvalues (rounding) count as 0.
  const at::Tensor ones = at::ones({4, 3}, at::kDouble);
  CHECK(same_bits(solve(gradient, none - 1e-3, ones, radius).solution.step, flat.solution.step));
  CHECK(same_bits(solve(gradient, ones, none - 1e-3, radius).solution.step, flat.solution.step));

  const Solved still = solve(at::zeros({4, 3, 3}, at::kDouble), none, none, radius);
  CHECK(same_bits(still.solution.step, at::zeros({4, 3, 3}, at::kDouble)));
  CHECK(same_bits(still.solution.model_decrease, at::zeros({4}, at::kDouble)));
}

TEST_CASE("no gradient along no curvature is no obstacle to a solution on the sphere") {
  const Solved own =
      solve(numbers({3.0, 3.0, 0.0}).view({1, 3, 1}), numbers({10.0, 1.0, 0.0}).view({1, 3}),
            at::ones({1, 1}, at::kDouble), numbers({0.5}));
  CHECK(own.length.item<double>() == doctest::Approx(0.5));
  CHECK(own.solution.multiplier.item<double>() > 0);
  CHECK(own.solution.step[0][2].item<double>() == 0);
}

TEST_CASE("never more iterations than are allowed") {
  const TrustRegionSubproblem problem{at::ones({1, 3, 3}, at::kDouble),
                                      numbers({1e-4, 1.0, 1e4}).view({1, 3}),
                                      numbers({1e-3, 1.0, 1e3}).view({1, 3})};
  CHECK(problem.solve(numbers({1e-2})).iterations.item<int64_t>() > 2);
  CHECK(problem.solve(numbers({1e-2}), 1e-12, 2).iterations.item<int64_t>() == 2);
}

TEST_CASE("the sum of several parts is one number as a tensor of one entry") {
  const Quartic part = quartic(numbers({1, 2}), numbers({0, 1}), numbers({0, 1}));
  const Quartic sum = Quartic::sum({part, part});
  CHECK(sum.c2.sizes() == at::IntArrayRef({1}));
  CHECK(sum.c2.item<double>() == 10);
  CHECK(sum.c3.item<double>() == 8);
  CHECK(sum.c4.item<double>() == 2);
}

TEST_CASE("layers are solved independently") {
  at::manual_seed(8);
  const at::Tensor gradient = randn({3, 4, 5}), out = at::rand({3, 4}, at::kDouble);
  const at::Tensor in = at::rand({3, 5}, at::kDouble), radius = numbers({1e-3, 0.1, 10.0});
  const Solved all = solve(gradient, out, in, radius);
  for (int64_t l = 0; l < 3; ++l) {
    const auto part = [&](const at::Tensor& x) { return x.slice(0, l, l + 1); };
    const Solved alone = solve(part(gradient), part(out), part(in), part(radius));
    CHECK(error(alone.solution.step, part(all.solution.step)) < 1e-13);
    CHECK(same_bits(alone.solution.iterations, part(all.solution.iterations)));
  }
}

TEST_CASE("shapes that do not fit and radii that are not positive are refused") {
  const auto message = [](at::IntArrayRef gradient, at::IntArrayRef out, at::IntArrayRef in,
                          const at::Tensor& radius) {
    const TrustRegionSubproblem problem{at::ones(gradient, at::kDouble), at::ones(out, at::kDouble),
                                        at::ones(in, at::kDouble)};
    return problems::error_of([&] { static_cast<void>(problem.solve(radius)); });
  };
  const at::Tensor ones = numbers({1.0, 1.0});
  const std::string shapes = message({2, 3, 4}, {2, 4}, {2, 3}, ones);
  CHECK(contains(shapes, "[ctrlora::TrustRegionSubproblem::solve] expected gradient (L, m, n)"));
  CHECK(contains(shapes, "got [2, 3, 4], [2, 4], [2, 3]."));
  CHECK(contains(message({3, 4}, {3}, {4}, ones), "got [3, 4], [3], [4]."));
  CHECK(contains(message({2, 3, 4}, {2, 3}, {1, 4}, ones), "got [2, 3, 4], [2, 3], [1, 4]."));
  for (const at::Tensor& radius : {numbers({1.0, 0.0}), numbers({-1.0, 1.0}), numbers({kNan, 1.0}),
                                   numbers({1.0}), at::ones({2, 1}, at::kDouble)}) {
    CHECK(contains(message({2, 3, 4}, {2, 3}, {2, 4}, radius),
                   "expected a positive radius (L); got "));
  }
  CHECK(message({2, 3, 4}, {2, 3}, {2, 4}, ones).empty());
}
