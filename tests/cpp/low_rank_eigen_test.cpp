#include "ctrlora/low_rank_eigen.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "problems.h"

namespace {

using ctrlora::FactorSketch;
using ctrlora::LowRankEigen;
using problems::dense;
using problems::dense_power;
using problems::error;
using problems::numbers;
using problems::positive;
using problems::randn;
using problems::rows_of;
using problems::same_bits;

at::Tensor all(int64_t layers) {
  return at::ones({layers}, at::kBool);
}
at::Tensor filled(int64_t layers, double value) {
  return at::full({layers}, value, at::kDouble);
}

/// Enters rows (L, R, d) with weight 1 under EMA weight `keep`.
at::Tensor enter(LowRankEigen& factor, const at::Tensor& rows, double keep, double scale = 1.0) {
  const at::Tensor weights = at::ones({rows.size(0), rows.size(1)}, at::kDouble);
  return factor.update(factor.sketch(rows, weights), filled(rows.size(0), keep),
                       filled(rows.size(0), scale));
}

LowRankEigen started(const at::Tensor& rows, int64_t k) {
  LowRankEigen factor(rows.size(0), rows.size(2), k, rows.options());
  factor.start_basis(rows, all(rows.size(0)), 0);
  return factor;
}

at::Tensor second_moment(const at::Tensor& rows) {
  return at::matmul(rows.mT(), rows) / static_cast<double>(rows.size(1));
}

double orthonormality(const LowRankEigen& factor) {
  const at::Tensor u = factor.basis().to(at::kDouble);
  const at::Tensor identity = at::eye(factor.sketch_rank(), at::kDouble);
  return (at::matmul(u.mT(), u) - identity).abs().max().item<double>();
}

std::vector<at::Tensor> state(const LowRankEigen& factor) {
  std::vector<at::Tensor> copies;
  for (const auto& item : factor.named_tensors()) {
    copies.push_back(item.second.clone());
  }
  return copies;
}

bool same_layer(const LowRankEigen& factor, const std::vector<at::Tensor>& other, int64_t layer) {
  const std::vector<at::Tensor> own = state(factor);
  return std::equal(own.begin(), own.end(), other.begin(),
                    [&](const auto& x, const auto& y) { return same_bits(x[layer], y[layer]); });
}

}  // namespace

TEST_CASE("a new factor is the identity, before and after its first basis") {
  at::manual_seed(0);
  for (const int64_t k : {1, 3, 6}) {
    LowRankEigen factor(2, 6, k, at::kDouble);
    CHECK(factor.layers() == 2);
    CHECK(factor.size() == 6);
    CHECK(factor.sketch_rank() == k);
    CHECK(same_bits(factor.trace(), filled(2, 6.0)));
    const at::Tensor v = randn({2, 6, 4});
    CHECK(error(factor.to_dense(), at::eye(6, at::kDouble).expand({2, 6, 6})) < 1e-14);
    CHECK(error(factor.apply_power(v, -0.5, 0.21), v / 1.1) < 1e-14);
    factor.start_basis(randn({2, 9, 6}), all(2), 3);
    CHECK(error(factor.to_dense(), at::eye(6, at::kDouble).expand({2, 6, 6})) < 1e-14);
    CHECK(error(factor.apply_power(v, -0.5, 0.21), v / 1.1) < 1e-14);
  }
}

TEST_CASE("sizes without meaning are refused") {
  const auto message = [](int64_t layers, int64_t size, int64_t k) {
    return problems::error_of([&] { const LowRankEigen factor(layers, size, k, at::kFloat); });
  };
  CHECK(
      message(1, 4, 5) ==
      "[ctrlora::LowRankEigen] expected layers >= 1 and 1 <= sketch_rank <= size; got layers = 1, "
      "sketch_rank = 5, size = 4.");
  CHECK(problems::contains(message(0, 4, 2), "got layers = 0"));
  CHECK(problems::contains(message(1, 4, 0), "sketch_rank = 0"));
}

TEST_CASE("a complete basis equals the dense EMA and its powers") {
  at::manual_seed(1);
  const at::Tensor truth = positive(3, 7, 2.0);
  LowRankEigen factor(3, 7, 7, at::kDouble);
  factor.start_basis(randn({3, 4, 7}), all(3), 0);
  at::Tensor ema = at::eye(7, at::kDouble).expand({3, 7, 7});
  for (const double keep : {0.0, 0.5, 0.9, 0.95, 0.0, 0.3}) {
    const at::Tensor rows = rows_of(truth, 20);
    const at::Tensor failed = enter(factor, rows, keep, 1.7);
    ema = keep * ema + (1 - keep) * 1.7 * second_moment(rows);
    CHECK_FALSE(failed.any().item<bool>());
    CHECK(error(factor.to_dense(), ema) < 1e-12);
    CHECK(error(factor.trace(), ema.diagonal(0, -2, -1).sum(-1)) < 1e-13);
    CHECK(orthonormality(factor) < 1e-12);
    CHECK(same_bits(factor.tail(), at::zeros({3}, at::kDouble)));
    for (const double exponent : {-1.0, -0.5, 0.5, 1.0}) {
      const at::Tensor v = randn({3, 7, 2});
      CHECK(error(factor.apply_power(v, exponent, 0.01),
                  at::matmul(dense_power(ema, exponent, 0.01), v)) < 1e-10);
    }
  }
}

TEST_CASE(
    "an incomplete basis is U diag(e) U' + rho (I - U U'), and its powers are those of that "
    "matrix") {
  at::manual_seed(2);
  LowRankEigen factor = started(rows_of(positive(2, 12), 40), 4);
  for (const double keep : {0.0, 0.6, 0.6}) {
    enter(factor, rows_of(positive(2, 12), 40), keep);
  }
  const at::Tensor matrix = dense(factor);
  CHECK(error(factor.to_dense(), matrix) < 1e-13);
  CHECK(error(matrix.diagonal(0, -2, -1).sum(-1), factor.trace()) < 1e-13);
  CHECK((factor.tail() > 0).all().item<bool>());
  const at::Tensor v = randn({2, 12, 3});
  for (const double exponent : {-1.0, -0.5, 0.0, 0.5, 1.0}) {
    CHECK(error(factor.apply_power(v, exponent, 0.05),
                at::matmul(dense_power(matrix, exponent, 0.05), v)) < 1e-11);
    const ctrlora::PowerCoefficients power = factor.power(exponent, 0.05);
    const at::Tensor lambda = 0.05 * factor.trace() / 12;
    CHECK(error(power.tail, (factor.tail() + lambda).pow(exponent)) < 1e-14);
    CHECK(error(power.diag + power.tail.unsqueeze(-1),
                (factor.eigenvalues() + lambda.unsqueeze(-1)).pow(exponent)) < 1e-13);
  }
  CHECK(same_bits(factor.power(0.5, 0.1).slice(1, 2).diag,
                  factor.power(0.5, 0.1).diag.slice(0, 1, 2)));
}

TEST_CASE("the trace is exact at every step and the basis stays orthonormal") {
  at::manual_seed(3);
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    const double tolerance = dtype == at::kDouble ? 1e-12 : 2e-5;
    const at::Tensor truth = positive(2, 40, 1.0);
    LowRankEigen factor = started(rows_of(truth, 30).to(dtype), 6);
    at::Tensor trace = filled(2, 40.0);
    for (int step = 1; step <= 40; ++step) {
      const double keep = std::min(0.95, 1.0 - 1.0 / step);
      const at::Tensor rows = rows_of(truth, 30).to(dtype);
      CHECK_FALSE(enter(factor, rows, keep).any().item<bool>());
      trace = keep * trace + (1 - keep) * rows.to(at::kDouble).square().sum({1, 2}) / 30;
      // Squares of float32 rows are rounded, their sum is not.
      CHECK(error(factor.trace(), trace) < (dtype == at::kDouble ? 1e-14 : 1e-8));
      CHECK(orthonormality(factor) < tolerance);
      CHECK((factor.eigenvalues() >= 0).all().item<bool>());
      CHECK((factor.tail() >= 0).all().item<bool>());
    }
  }
}

TEST_CASE("the share of the trace that the basis holds is near the best of its size") {
  at::manual_seed(4);
  constexpr int64_t kSize = 96;
  constexpr int64_t kRank = 8;
  const at::Tensor truth = positive(2, kSize, 1.0);
  LowRankEigen factor = started(rows_of(truth, 64), kRank);
  at::Tensor ema = at::zeros_like(truth);
  for (int step = 1; step <= 20; ++step) {
    const double keep = std::min(0.95, 1.0 - 1.0 / step);
    const at::Tensor rows = rows_of(truth, 64);
    enter(factor, rows, keep);
    ema = keep * ema + (1 - keep) * second_moment(rows);
  }
  const at::Tensor values = at::linalg_eigvalsh(ema);
  const at::Tensor best = values.slice(1, kSize - kRank).sum(-1) / values.sum(-1);
  const at::Tensor share = factor.captured_share();
  CHECK((share <= best + 1e-12).all().item<bool>());
  CHECK((share >= 0.97 * best).all().item<bool>());
  // What is held is really there: Rayleigh quotients of the dense average.
  const at::Tensor rayleigh =
      at::matmul(factor.basis().mT(), at::matmul(ema, factor.basis())).diagonal(0, -2, -1);
  CHECK(error(factor.eigenvalues(), rayleigh) < 0.05);
}

TEST_CASE("a factor of rank k is found exactly") {
  at::manual_seed(5);
  const at::Tensor rows = at::matmul(randn({2, 50, 3}), randn({2, 3, 30}));
  LowRankEigen factor = started(rows, 3);
  for (int step = 0; step < 12; ++step) {
    enter(factor, rows, 0.0);
  }
  CHECK(error(factor.to_dense(), second_moment(rows)) < 1e-11);
  CHECK(error(factor.captured_share(), at::ones({2}, at::kDouble)) < 1e-12);
}

TEST_CASE("fewer rows than the basis, and a mean far above them, keep their spectrum in float32") {
  at::manual_seed(16);
  constexpr int64_t kSize = 600;
  constexpr int64_t kSketch = 16;
  for (const int64_t count : {1, 6, 10, 15, 40}) {
    for (const double mean : {0.0, 1.0, 30.0}) {
      CAPTURE(count);
      CAPTURE(mean);
      // Others, of weight 0, start the basis too: what it holds at first is hardly theirs.
      const at::Tensor rows = (randn({2, 64, kSize}) + mean * randn({2, 1, kSize})).to(at::kFloat);
      at::Tensor weights = at::zeros({2, 64}, at::kDouble);
      weights.slice(1, 0, count).fill_(1.6);
      LowRankEigen factor = started(rows, kSketch);
      for (int step = 1; step <= 8; ++step) {
        const at::Tensor failed = factor.update(factor.sketch(rows, weights),
                                                filled(2, 1.0 - 1.0 / step), filled(2, 1.0));
        CHECK_FALSE(failed.any().item<bool>());
        CHECK(orthonormality(factor) < 1e-5);
        // A Nystrom approximation is below what it approximates.
        const at::Tensor share = factor.eigenvalues().sum(-1) / factor.trace();
        CHECK((share <= 1 + 1e-5).all().item<bool>());
      }
      if (count >= kSketch) {
        continue;  // the basis turns to the largest step by step
      }
      const at::Tensor exact =
          at::linalg_eigvalsh(second_moment(rows.slice(1, 0, count).to(at::kDouble)));
      const at::Tensor found = std::get<0>(factor.eigenvalues().sort(-1));
      const at::Tensor ratio =
          found.slice(1, kSketch - count) / exact.slice(1, kSize - count);  // smallest first
      CHECK((ratio.select(1, -1) - 1).abs().max().item<double>() < 1e-5);
      CHECK((ratio > 0.5).all().item<bool>());
      CHECK((ratio < 1.01).all().item<bool>());
    }
  }
}

TEST_CASE("one repeated row, fewer rows than the basis, and rows of zeros survive") {
  at::manual_seed(6);
  const at::Tensor v = randn({2, 1, 24});
  const at::Tensor norm = v.square().sum({1, 2});
  LowRankEigen factor = started(v.expand({2, 5, 24}), 4);
  for (int step = 0; step < 5; ++step) {
    CHECK_FALSE(enter(factor, v.expand({2, 5, 24}), 0.0).any().item<bool>());
    CHECK(orthonormality(factor) < 1e-12);
    CHECK(error(factor.trace(), norm) < 1e-13);
  }
  CHECK(error(factor.to_dense(), at::matmul(v.mT(), v)) < 1e-11);
  CHECK(factor.apply_power(randn({2, 24, 3}), -1.0, 0.01).isfinite().all().item<bool>());

  const std::vector<at::Tensor> before = state(factor);
  CHECK_FALSE(enter(factor, at::zeros({2, 5, 24}, at::kDouble), 0.5).any().item<bool>());
  CHECK(same_layer(factor, before, 0));
  CHECK(same_layer(factor, before, 1));

  // Rounding must not leave a negative eigenvalue in a complete basis either.
  LowRankEigen complete = started(randn({2, 3, 24}), 24);
  enter(complete, randn({2, 3, 24}), 0.0);
  CHECK((complete.eigenvalues() >= 0).all().item<bool>());
  CHECK(complete.power(0.5, 0.0).diag.isfinite().all().item<bool>());

  LowRankEigen from_zeros = started(at::zeros({2, 5, 24}, at::kDouble), 4);
  CHECK(orthonormality(from_zeros) < 1e-12);
  CHECK_FALSE(enter(from_zeros, v.expand({2, 5, 24}), 0.0).any().item<bool>());
  CHECK(error(from_zeros.trace(), norm) < 1e-13);
}

TEST_CASE(
    "layers without weight, with keep = 1 or non-finite sums stay bit for bit, others do not "
    "notice") {
  at::manual_seed(7);
  for (const int64_t k : {4, 10}) {
    const at::Tensor rows = randn({2, 30, 10});
    LowRankEigen factor = started(rows, k);
    enter(factor, rows, 0.0);
    const std::vector<at::Tensor> before = state(factor);
    const auto run = [&](const FactorSketch& sketch, const at::Tensor& keep,
                         const at::Tensor& scale) {
      LowRankEigen own = started(rows, k);
      enter(own, rows, 0.0);
      CHECK_FALSE(own.update(sketch, keep, scale).any().item<bool>());
      return own;
    };
    const at::Tensor ones = at::ones({2, 30}, at::kDouble);
    const FactorSketch good = factor.sketch(randn({2, 30, 10}), ones);
    const LowRankEigen moved = run(good, filled(2, 0.5), filled(2, 1.0));
    CHECK_FALSE(same_layer(moved, before, 0));
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const double inf = std::numeric_limits<double>::infinity();
    const auto check = [&](const FactorSketch& sketch, const at::Tensor& keep,
                           const at::Tensor& scale) {
      const LowRankEigen after = run(sketch, keep, scale);
      CHECK(same_layer(after, before, 0));
      CHECK(same_layer(after, state(moved), 1));
    };
    for (const double bad : {nan, inf, -inf}) {
      FactorSketch sketch = good;
      sketch.product = good.product.clone();
      sketch.product.select(0, 0).select(0, 3).select(0, 1).fill_(bad);
      check(sketch, filled(2, 0.5), filled(2, 1.0));
      sketch = good;
      sketch.trace = good.trace * numbers({bad, 1.0});
      check(sketch, filled(2, 0.5), filled(2, 1.0));
      check(good, filled(2, 0.5), numbers({bad, 1.0}));
    }
    check(good, numbers({1.0, 0.5}), filled(2, 1.0));
    FactorSketch empty = good;
    empty.weight = good.weight * numbers({0.0, 1.0});
    check(empty, filled(2, 0.5), filled(2, 1.0));
  }
}

TEST_CASE("sketches are linear in the rows, and a weight is a number of copies") {
  at::manual_seed(8);
  const at::Tensor rows = randn({2, 30, 12});
  const LowRankEigen factor = started(rows, 5);
  const at::Tensor weights = at::rand({2, 30}, at::kDouble);
  const auto part = [&](int64_t begin, int64_t end) {
    return factor.sketch(rows.slice(1, begin, end), weights.slice(1, begin, end));
  };
  const FactorSketch first = part(0, 13), second = part(13, 30), whole = part(0, 30);
  CHECK(error(first.product + second.product, whole.product) < 1e-14);
  CHECK(error(first.trace + second.trace, whole.trace) < 1e-14);
  CHECK(error(first.weight + second.weight, whole.weight) < 1e-14);

  const at::Tensor moment = at::matmul(rows.mT(), rows * weights.unsqueeze(-1));
  CHECK(error(whole.product, at::matmul(moment, factor.basis())) < 1e-14);
  CHECK(error(whole.trace, moment.diagonal(0, -2, -1).sum(-1)) < 1e-14);
  CHECK(error(whole.weight, weights.sum(-1)) < 1e-15);

  const FactorSketch tripled = factor.sketch(rows, at::full({2, 30}, 3.0, at::kDouble));
  const FactorSketch copies = factor.sketch(rows.repeat({1, 3, 1}), at::ones({2, 90}, at::kDouble));
  CHECK(error(tripled.product, copies.product) < 1e-14);
  CHECK(error(tripled.trace, copies.trace) < 1e-14);
}

TEST_CASE("layers are independent: a batch equals its layers one by one, and slices are views") {
  at::manual_seed(9);
  const at::Tensor rows = randn({3, 30, 12}), more = randn({3, 30, 12});
  LowRankEigen batch = started(rows, 5);
  enter(batch, more, 0.3);
  LowRankEigen sliced = started(rows, 5);
  for (int64_t l = 0; l < 3; ++l) {
    LowRankEigen alone = started(rows.slice(0, l, l + 1), 5);
    enter(alone, more.slice(0, l, l + 1), 0.3);
    CHECK(error(alone.to_dense(), batch.to_dense().slice(0, l, l + 1)) < 1e-12);
    LowRankEigen view = sliced.slice(l, l + 1);
    enter(view, more.slice(0, l, l + 1), 0.3);
  }
  CHECK(error(sliced.to_dense(), batch.to_dense()) < 1e-12);
}

TEST_CASE("a first basis depends on rows and seed alone and only where it is wanted") {
  at::manual_seed(10);
  const at::Tensor rows = randn({2, 30, 12});
  CHECK(same_bits(started(rows, 5).basis(), started(rows, 5).basis()));
  LowRankEigen other(2, 12, 5, at::kDouble);
  other.start_basis(rows, numbers({0.0, 1.0}) > 0, 1);
  CHECK(same_bits(other.basis()[0], at::zeros({12, 5}, at::kDouble)));
  CHECK_FALSE(same_bits(other.basis()[1], started(rows, 5).basis()[1]));
  CHECK(orthonormality(other.slice(1, 2)) < 1e-12);
}

TEST_CASE("state is named, live, and moves to another dtype") {
  LowRankEigen factor = started(randn({2, 30, 12}), 5);
  const auto named = factor.named_tensors();
  REQUIRE(named.size() == 3);
  CHECK(named[0].first == "basis");
  CHECK(named[1].first == "eigenvalues");
  CHECK(named[2].first == "trace");
  named[2].second.fill_(48.0);
  CHECK(same_bits(factor.trace(), filled(2, 48.0)));
  const at::Tensor before = factor.basis();
  factor.to(at::TensorOptions().dtype(at::kFloat));
  CHECK(same_bits(factor.basis(), before.to(at::kFloat)));
  CHECK((factor.eigenvalues().scalar_type() == at::kDouble));
}

TEST_CASE("nothing of size d x d is allocated at d = 4096") {
  constexpr int64_t kSize = 4096;
  constexpr int64_t kMatrix = kSize * kSize * 4;
  const at::Tensor rows = at::randn({1, 64, kSize}), v = at::randn({1, kSize, 16});
  problems::LargestAllocation largest;
  LowRankEigen factor(1, kSize, 16, at::kFloat);
  factor.start_basis(rows, all(1), 0);
  for (int step = 0; step < 2; ++step) {
    enter(factor, rows, 0.5);
    CHECK(factor.apply_power(v, -0.5, 0.01).isfinite().all().item<bool>());
  }
  const int64_t seen = largest.bytes();
  CHECK(seen >= kSize * 16 * 4);  // the watch works: the basis went through it
  CHECK(seen <= kMatrix / 16);
  at::empty({kSize, kSize}, at::kFloat);
  CHECK(largest.bytes() == kMatrix);
}
