// Sketches of the whitened gradient against its dense float64 singular value decomposition.
#include "ctrlora/whitened_gradient.h"

#include <cmath>

#include "problems.h"

namespace {

using ctrlora::FactoredGradient;
using ctrlora::GradientSketch;
using ctrlora::KroneckerFactors;
using ctrlora::Options;
using ctrlora::WhitenedGradient;
using ctrlora::WhitenedSvd;
using problems::dense;
using problems::dense_power;
using problems::error;
using problems::randn;

constexpr int64_t kLayers = 2, kIn = 9, kOut = 7;

struct Rows {
  at::Tensor x, g;  // (L, N, n), (L, N, m)
};

Rows make_rows(int64_t rows, int64_t in = kIn, int64_t out = kOut, int64_t layers = kLayers) {
  const at::Tensor x = problems::rows_of(problems::positive(layers, in), rows);
  const at::Tensor g = problems::rows_of(problems::positive(layers, out, 0.7), rows);
  // Some of g depends on x, so that there is a gradient beside the noise.
  return {x, g + 0.3 * at::matmul(x, randn({layers, in, out}))};
}

// Factors that have seen these rows once; k < d if `rank` is smaller.
KroneckerFactors factors_of(const Rows& rows, int64_t rank = 64) {
  Options options;
  options.sketch_rank = rank;
  KroneckerFactors factors(rows.x.size(0), rows.x.size(2), rows.g.size(2), options,
                           rows.x.options());
  const at::Tensor all = at::ones({rows.x.size(0)}, at::kBool);
  const at::Tensor weights = at::ones({rows.x.size(0), rows.x.size(1)}, at::kDouble);
  factors.input.start_basis(rows.x, all, 1);
  factors.output.start_basis(rows.g, all, 1);
  ctrlora::CurvatureSketch sketch{
      factors.input.sketch(rows.x, weights), factors.output.sketch(rows.g, weights),
      at::ones({rows.x.size(0)}, at::kDouble), at::ones({rows.x.size(0)}, at::kDouble),
      at::zeros({rows.x.size(0)}, at::kBool)};
  factors.commit(sketch, options);
  return factors;
}

void add(const WhitenedGradient& gradient, GradientSketch& sums, const Rows& rows) {
  for (int64_t l = 0; l < rows.x.size(0); ++l) {
    gradient.add(sums, l, rows.x[l], gradient.input_coordinates(l, rows.x[l]), rows.g[l]);
  }
  sums.batches.add_(1);
}

// S_g^-1/2 (mean of g x^T sums) O_g^-1/2 of the factors as they are.
at::Tensor dense_gradient(const KroneckerFactors& factors,
                          double whitening,
                          const std::vector<Rows>& batches) {
  at::Tensor gradient =
      at::zeros({batches[0].x.size(0), batches[0].g.size(2), batches[0].x.size(2)}, at::kDouble);
  for (const Rows& rows : batches) {
    gradient = gradient + at::matmul(rows.g.mT(), rows.x) / static_cast<double>(batches.size());
  }
  const at::Tensor s = dense_power(dense(factors.output), -0.5 * whitening, 0.01);
  const at::Tensor o = dense_power(dense(factors.input), -0.5 * whitening, 0.01);
  return at::matmul(at::matmul(s, gradient), o);
}

at::Tensor product(const WhitenedSvd& svd) {
  return at::matmul(svd.left * svd.values.unsqueeze(1), svd.right.mT());
}

at::Tensor best(const at::Tensor& matrix, int64_t rank) {
  const auto [u, s, vh] = at::linalg_svd(matrix, false);
  return at::matmul(u.narrow(2, 0, rank) * s.narrow(1, 0, rank).unsqueeze(1),
                    vh.narrow(1, 0, rank));
}

at::Tensor gram_error(const at::Tensor& columns) {
  return (at::matmul(columns.mT(), columns) - at::eye(columns.size(2), columns.options())).abs();
}

}  // namespace

TEST_CASE("a full sketch over streamed batches is the dense decomposition") {
  at::manual_seed(0);
  const std::vector<Rows> batches = {make_rows(40), make_rows(25)};
  for (const double whitening : {0.0, 0.5, 1.0}) {
    const KroneckerFactors factors = factors_of(batches[0]);
    const WhitenedGradient gradient(factors, whitening, 0.01, kOut, 3);
    GradientSketch sums = gradient.empty();
    add(gradient, sums, batches[0]);
    add(gradient, sums, batches[1]);
    const WhitenedSvd got = ctrlora::svd(gradient.reconstruct(sums), 4);
    const at::Tensor expected = dense_gradient(factors, whitening, batches);
    CHECK(error(got.values, std::get<1>(at::linalg_svd(expected)).narrow(1, 0, 4)) < 1e-9);
    CHECK(error(product(got), best(expected, 4)) < 1e-8);
    CHECK(gram_error(got.left).max().item<double>() < 1e-8);
    CHECK(gram_error(got.right).max().item<double>() < 1e-8);
    CHECK(error(gradient.energy(sums), expected.square().sum({1, 2})) < 1e-9);
  }
}

TEST_CASE("a gradient of rank p is found exactly, with low-rank factors in the metric") {
  at::manual_seed(1);
  const Rows rows = make_rows(60, 30, 24);
  const KroneckerFactors factors = factors_of(rows, 5);
  const WhitenedGradient gradient(factors, 0.5, 0.01, 6, 3);
  const Rows few = make_rows(6, 30, 24);  // rank 6
  GradientSketch sums = gradient.empty();
  add(gradient, sums, few);
  const WhitenedSvd got = ctrlora::svd(gradient.reconstruct(sums), 6);
  CHECK(error(product(got), dense_gradient(factors, 0.5, {few})) < 1e-8);

  const Rows fewer = {few.x.narrow(1, 0, 2), few.g.narrow(1, 0, 2)};  // rank below the sketch's
  GradientSketch two = gradient.empty();
  add(gradient, two, fewer);
  const WhitenedSvd found = ctrlora::svd(gradient.reconstruct(two), 6);
  CHECK(error(product(found), dense_gradient(factors, 0.5, {fewer})) < 1e-8);
  CHECK(found.values.narrow(1, 2, 4).abs().max().item<double>() <
        1e-6 * found.values.max().item<double>());
}

TEST_CASE("the sketch is linear in the rows, and float32 agrees with float64") {
  at::manual_seed(2);
  const Rows rows = make_rows(50, 30, 24);
  const KroneckerFactors factors = factors_of(rows, 5);
  const WhitenedGradient gradient(factors, 0.5, 0.01, 8, 3);
  GradientSketch one = gradient.empty(), two = gradient.empty(), all = gradient.empty();
  add(gradient, one, {rows.x.narrow(1, 0, 20), rows.g.narrow(1, 0, 20)});
  add(gradient, two, {rows.x.narrow(1, 20, 30), rows.g.narrow(1, 20, 30)});
  add(gradient, all, rows);
  CHECK(error((one + two).range, all.range) < 1e-12);
  CHECK(error((one + two).corange, all.corange) < 1e-12);
  CHECK((one + two).batches.eq(2).all().item<bool>());

  KroneckerFactors narrow = factors_of(rows, 5);
  narrow.to(at::TensorOptions().dtype(at::kFloat));
  const WhitenedGradient single(narrow, 0.5, 0.01, 8, 3);
  GradientSketch sums = single.empty();
  add(single, sums, {rows.x.to(at::kFloat), rows.g.to(at::kFloat)});
  const WhitenedSvd wide = ctrlora::svd(gradient.reconstruct(all), 4);
  const WhitenedSvd got = ctrlora::svd(single.reconstruct(sums), 4);
  CHECK((got.left.scalar_type() == at::kFloat));
  CHECK(error(got.values, wide.values) < 1e-5);
  const WhitenedSvd widened{got.left.to(at::kDouble), got.values, got.right.to(at::kDouble),
                            got.ok};
  CHECK(error(product(widened), product(wide)) < 1e-4);
}

TEST_CASE("a narrow sketch is close to the best approximation where the spectrum decays") {
  at::manual_seed(3);
  const Rows rows = make_rows(400, 60, 50);
  const KroneckerFactors factors = factors_of(rows, 8);
  const WhitenedGradient gradient(factors, 0.5, 0.01, WhitenedGradient::default_probes(4), 3);
  GradientSketch sums = gradient.empty();
  add(gradient, sums, rows);
  const at::Tensor expected = dense_gradient(factors, 0.5, {rows});
  const at::Tensor got = product(ctrlora::svd(gradient.reconstruct(sums), 4));
  const auto off = [&](const at::Tensor& x) { return (x - expected).norm(2, {1, 2}); };
  CHECK((off(got) / off(best(expected, 4))).max().item<double>() < 1.25);
}

namespace {

// White rows: Omega and S are I, G~ = G / (1.01).
struct White {
  KroneckerFactors factors;
  WhitenedGradient gradient;
};

White white(int64_t in, int64_t out, double whitening, int64_t probes) {
  Options options;
  options.sketch_rank = 4;
  const KroneckerFactors factors(1, in, out, options, at::TensorOptions().dtype(at::kDouble));
  return {factors, WhitenedGradient(factors, whitening, 1e-9, probes, 5)};
}

// `batches` batches of mean gradients of `rows` rows: g noise, plus a planted sigma u v^T.
GradientSketch noisy(const WhitenedGradient& gradient,
                     int64_t batches,
                     int64_t rows,
                     double sigma,
                     int64_t in,
                     int64_t out) {
  GradientSketch sums = gradient.empty();
  for (int64_t batch = 0; batch < batches; ++batch) {
    const at::Tensor x = randn({1, rows, in});
    x.select(2, 0).sign_();  // of size 1: sigma is the planted value, not sigma times a mean
    const at::Tensor g = randn({1, rows, out}) / static_cast<double>(rows);
    g.select(2, 0).add_(x.select(2, 0), sigma / static_cast<double>(rows));
    add(gradient, sums, {x, g});
  }
  return sums;
}

}  // namespace

TEST_CASE("pure noise: the halves tell the sample count, the floor bounds the spectrum") {
  at::manual_seed(4);
  const White problem = white(40, 30, 1.0, 30);
  const GradientSketch one = noisy(problem.gradient, 4, 100, 0.0, 40, 30);
  const GradientSketch two = noisy(problem.gradient, 4, 100, 0.0, 40, 30);
  const at::Tensor samples = problem.gradient.effective_samples(one, two);
  CHECK(error(samples, problems::numbers({800.0})) < 0.1);
  const ctrlora::NoiseModel noise = problem.gradient.noise(samples);
  const double known = (std::sqrt(30.0) + std::sqrt(40.0)) / std::sqrt(800.0);
  CHECK(error(noise.floor(), problems::numbers({known})) < 0.05);
  const WhitenedSvd all = ctrlora::svd(problem.gradient.reconstruct(one + two), 8);
  CHECK(all.values.max().item<double>() < 1.1 * known);
  CHECK(all.values.max().item<double>() > 0.8 * known);

  const at::Tensor split = ctrlora::split_half_values(problem.gradient.reconstruct(one),
                                                      problem.gradient.reconstruct(two), 8);
  CHECK(split.max().item<double>() < 3.0 * noise.unit.item<double>());
  CHECK(noise.shrink(problems::numbers({0.9 * known}).unsqueeze(0)).item<double>() == 0.0);
}

TEST_CASE("split halves and shrinkage take the noise's share out of a planted value") {
  at::manual_seed(5);
  const White problem = white(40, 30, 1.0, 30);
  const double sigma = 0.6;  // floor 0.42
  const GradientSketch one = noisy(problem.gradient, 4, 100, sigma, 40, 30);
  const GradientSketch two = noisy(problem.gradient, 4, 100, sigma, 40, 30);
  const at::Tensor raw =
      ctrlora::svd(problem.gradient.reconstruct(one + two), 1).values.reshape({1, 1});
  const double split = ctrlora::split_half_values(problem.gradient.reconstruct(one),
                                                  problem.gradient.reconstruct(two), 1)
                           .item<double>();
  const ctrlora::NoiseModel noise =
      problem.gradient.noise(problem.gradient.effective_samples(one, two));
  CHECK(raw.item<double>() > 1.08 * sigma);
  CHECK(split < sigma);
  CHECK(split > 0.6 * sigma);
  CHECK(noise.shrink(raw).item<double>() < raw.item<double>());
  // eta(y) as written in the method, b = m / n, y = sigma sqrt(N / n)
  const ctrlora::NoiseModel exact{problems::numbers({std::sqrt(1.0 / 800.0)}),
                                  problems::numbers({30.0}), problems::numbers({40.0})};
  const double y = raw.item<double>() * std::sqrt(800.0 / 40.0);
  const double b = 30.0 / 40.0;
  const double eta = std::sqrt(std::pow(y * y - b - 1, 2) - 4 * b) / y * std::sqrt(40.0 / 800.0);
  CHECK(exact.shrink(raw).item<double>() == doctest::Approx(eta));
}

TEST_CASE("coloured noise stays below the floor of what whitening leaves") {
  at::manual_seed(6);
  const at::Tensor root = at::linalg_cholesky(problems::positive(1, 40, 0.6));
  const auto coloured = [&](int64_t rows) {
    return Rows{at::matmul(randn({1, rows, 40}), root.mT()),
                randn({1, rows, 30}) / static_cast<double>(rows)};
  };
  const KroneckerFactors factors = factors_of(coloured(4000));
  const WhitenedGradient gradient(factors, 0.5, 0.01, 30, 5);
  GradientSketch one = gradient.empty(), two = gradient.empty();
  for (int batch = 0; batch < 4; ++batch) {
    add(gradient, one, coloured(100));
    add(gradient, two, coloured(100));
  }
  const double floor = gradient.noise(gradient.effective_samples(one, two)).floor().item<double>();
  const double top = ctrlora::svd(gradient.reconstruct(one + two), 1).values.item<double>();
  CHECK(top < 1.1 * floor);
  CHECK(top > 0.6 * floor);

  // Directions that do not depend on the rows: their values scatter as predicted.
  const at::Tensor samples = gradient.effective_samples(one, two);
  const WhitenedSvd fixed{at::eye(30, at::kDouble).narrow(1, 0, 20).unsqueeze(0),
                          {},
                          at::eye(40, at::kDouble).narrow(1, 0, 20).unsqueeze(0),
                          {}};
  const at::Tensor seen = ctrlora::along(gradient.reconstruct(one + two), fixed.left, fixed.right);
  const double chi = (seen / gradient.deviation(fixed, samples)).square().mean().item<double>();
  CHECK(chi > 0.4);
  CHECK(chi < 2.0);
}

TEST_CASE("the residual is the gradient off the pair's spans, in the metric") {
  at::manual_seed(7);
  const Rows rows = make_rows(60);
  const KroneckerFactors factors = factors_of(rows);
  const WhitenedGradient gradient(factors, 0.5, 0.01, kOut, 3);
  GradientSketch sums = gradient.empty();
  add(gradient, sums, rows);
  at::Tensor b = randn({kLayers, kOut, 3});
  b.select(2, 1).zero_();  // an inactive direction
  const at::Tensor a = randn({kLayers, 3, kIn});
  const FactoredGradient rest = gradient.residual(gradient.reconstruct(sums), b, a);

  const auto off = [](const at::Tensor& span) {
    return at::eye(span.size(1), at::kDouble) - at::matmul(span, at::linalg_pinv(span, 1e-10));
  };
  const at::Tensor s_half = dense_power(dense(factors.output), 0.25, 0.01);
  const at::Tensor o_half = dense_power(dense(factors.input), 0.25, 0.01);
  const at::Tensor expected =
      at::matmul(at::matmul(off(at::matmul(s_half, b)), dense_gradient(factors, 0.5, {rows})),
                 off(at::matmul(o_half, a.mT())));
  CHECK(error(at::matmul(rest.left, rest.right.mT()), expected) < 1e-8);
  CHECK(error(product(ctrlora::svd(rest, 3)), best(expected, 3)) < 1e-7);
}

TEST_CASE("a layer with NaN comes out as not ok, the others as if it were not there") {
  at::manual_seed(8);
  Rows rows = make_rows(40);
  const KroneckerFactors factors = factors_of(rows);
  const WhitenedGradient gradient(factors, 0.5, 0.01, kOut, 3);
  GradientSketch good = gradient.empty(), bad = gradient.empty();
  add(gradient, good, rows);
  rows.g[1][3][2] = NAN;
  add(gradient, bad, rows);
  const WhitenedSvd expected = ctrlora::svd(gradient.reconstruct(good), 3);
  const WhitenedSvd got = ctrlora::svd(gradient.reconstruct(bad), 3);
  CHECK(got.ok[0].item<bool>());
  CHECK_FALSE(got.ok[1].item<bool>());
  CHECK(got.values[1].eq(0).all().item<bool>());
  CHECK(problems::same_bits(got.left[0], expected.left[0]));
}

TEST_CASE("nothing of the size of the gradient or of a factor is allocated") {
  at::manual_seed(9);
  const int64_t size = 700;
  const Rows rows{randn({1, 16, size}, at::kFloat), randn({1, 16, size}, at::kFloat)};
  Options options;
  KroneckerFactors factors(1, size, size, options, at::TensorOptions().dtype(at::kFloat));
  const problems::LargestAllocation watch;
  const WhitenedGradient gradient(factors, 0.5, 0.01, 20, 3);
  GradientSketch sums = gradient.empty();
  add(gradient, sums, rows);
  const FactoredGradient found = gradient.reconstruct(sums);
  const WhitenedSvd got = ctrlora::svd(
      gradient.residual(found, rows.g.mT().narrow(2, 0, 4), rows.x.narrow(1, 0, 4)), 4);
  CHECK(got.ok.all().item<bool>());
  CHECK(watch.bytes() < size * size * 4 / 2);
  CHECK(WhitenedGradient::sketch_bytes(size, size, 20, 4) ==
        static_cast<int64_t>(sums.range.nbytes() + sums.corange.nbytes()));
}

TEST_CASE("arguments out of range are refused") {
  at::manual_seed(10);
  const KroneckerFactors factors = factors_of(make_rows(20));
  CHECK(problems::contains(problems::error_of([&] { WhitenedGradient(factors, 0.5, 0.01, 0, 1); }),
                           "[ctrlora::WhitenedGradient] expected probes >= 1; got 0"));
  const WhitenedGradient gradient(factors, 0.5, 0.01, 3, 1);
  CHECK(problems::contains(
      problems::error_of([&] { ctrlora::svd(gradient.reconstruct(gradient.empty()), 4); }),
      "expected 1 <= rank <= 3; got 4"));
}
