#include "ctrlora/kronecker_factors.h"

#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <vector>

#include "problems.h"

namespace {

using ctrlora::CurvatureSketch;
using ctrlora::KroneckerFactors;
using ctrlora::Options;
using problems::error;
using problems::numbers;
using problems::randn;
using problems::same_bits;

constexpr int64_t kLayers = 2;
constexpr int64_t kIn = 5;
constexpr int64_t kOut = 4;

/// Rows of one batch: x (L, R, n), g (L, R, m), weights (L, R), |W0 x|^2 per row (L, R).
struct Batch {
  at::Tensor x, g, weights, base;
  static Batch random(int64_t rows) {
    return {randn({kLayers, rows, kIn}), randn({kLayers, rows, kOut}),
            at::rand({kLayers, rows}, at::kDouble) + 0.5, at::rand({kLayers, rows}, at::kDouble)};
  }
  [[nodiscard]] at::Tensor moment(const at::Tensor& rows) const {  // sum of w x x^T
    return at::matmul(rows.mT(), rows * weights.unsqueeze(-1));
  }
  [[nodiscard]] at::Tensor total() const { return weights.sum(-1); }
};

at::Tensor matrix(const at::Tensor& per_layer) {
  return per_layer.view({-1, 1, 1});
}
at::Tensor flags(bool value) {
  return at::full({kLayers}, value, at::kBool);
}

KroneckerFactors started(const Options& options) {
  KroneckerFactors factors(kLayers, kIn, kOut, options, at::kDouble);
  factors.input.start_basis(randn({kLayers, 9, kIn}), flags(true), 0);
  factors.output.start_basis(randn({kLayers, 9, kOut}), flags(true), 0);
  return factors;
}

CurvatureSketch sketch(const KroneckerFactors& factors, const Batch& batch, bool proxy = false) {
  return {factors.input.sketch(batch.x, batch.weights),
          factors.output.sketch(batch.g, batch.weights), (batch.base * batch.weights).sum(-1),
          at::full({kLayers}, 3.0, at::kDouble), flags(proxy)};
}

std::vector<at::Tensor> state(const KroneckerFactors& factors) {
  std::vector<at::Tensor> copies;
  for (const auto& item : factors.named_tensors()) {
    copies.push_back(item.second.clone());
  }
  return copies;
}

bool same_layer(const KroneckerFactors& factors,
                const std::vector<at::Tensor>& other,
                int64_t layer) {
  const std::vector<at::Tensor> own = state(factors);
  return std::equal(own.begin(), own.end(), other.begin(),
                    [&](const auto& x, const auto& y) { return same_bits(x[layer], y[layer]); });
}

/// S after one commit of `batch` under these loss settings.
at::Tensor output_after(const Batch& batch, int64_t terms, const std::string& reduction) {
  Options options;
  options.loss_terms = terms;
  options.loss_reduction = reduction;
  KroneckerFactors factors = started(options);
  factors.commit(sketch(factors, batch), options);
  return factors.output.to_dense();
}

}  // namespace

TEST_CASE("new factors are the identity and the base has unit gain") {
  const KroneckerFactors factors = started(Options{});
  CHECK(error(factors.input.to_dense(), at::eye(kIn).expand({kLayers, kIn, kIn})) < 1e-14);
  CHECK(error(factors.output.to_dense(), at::eye(kOut).expand({kLayers, kOut, kOut})) < 1e-14);
  CHECK(same_bits(factors.base_square, at::full({kLayers}, double{kOut}, at::kDouble)));
  CHECK(same_bits(factors.seen, at::zeros({kLayers}, at::kDouble)));
  CHECK(same_bits(factors.absolute, flags(false)));
}

TEST_CASE("k is the smallest of sketch_rank, the size and dense_limit") {
  Options options;
  options.sketch_rank = 16;
  options.dense_limit = 10;
  const KroneckerFactors capped(1, 30, 6, options, at::kFloat);
  CHECK(capped.input.sketch_rank() == 10);
  CHECK(capped.output.sketch_rank() == 6);
  options.dense_limit = 256;
  const KroneckerFactors wide(1, 30, 20, options, at::kFloat);
  CHECK(wide.input.sketch_rank() == 16);
  CHECK(wide.output.sketch_rank() == 16);
}

TEST_CASE("a plain mean first, then an EMA, of both factors and of the base's square") {
  at::manual_seed(0);
  Options options;
  options.factor_beta = 0.75;
  KroneckerFactors factors = started(options);
  at::Tensor input, output, base;
  for (int step = 1; step <= 8; ++step) {
    const Batch batch = Batch::random(11 + step);
    factors.commit(sketch(factors, batch), options);
    const double keep = std::min(0.75, 1.0 - 1.0 / step);
    const auto mix = [&](at::Tensor& mean, const at::Tensor& fresh) {
      mean = step == 1 ? fresh : keep * mean + (1 - keep) * fresh;
    };
    mix(input, batch.moment(batch.x) / matrix(batch.total()));
    mix(output, batch.moment(batch.g) * matrix(batch.total()));  // tokens, mean: S = T sum w g g^T
    mix(base, (batch.base * batch.weights).sum(-1) / batch.total());
    CHECK(error(factors.input.to_dense(), input) < 1e-12);
    CHECK(error(factors.output.to_dense(), output) < 1e-12);
    CHECK(error(factors.base_square, base) < 1e-13);
    CHECK(same_bits(factors.seen, at::full({kLayers}, double(step), at::kDouble)));
    CHECK(same_bits(factors.absolute, flags(true)));
  }
}

TEST_CASE("S is per loss term whatever the loss averages over") {
  at::manual_seed(1);
  const Batch batch = Batch::random(12);
  const at::Tensor sum = batch.moment(batch.g);
  CHECK(error(output_after(batch, ctrlora::kLossTermsTokens, "mean"), sum * matrix(batch.total())) <
        1e-12);
  CHECK(error(output_after(batch, ctrlora::kLossTermsSequences, "mean"), sum * 3.0) < 1e-12);
  CHECK(error(output_after(batch, 7, "mean"), sum * 7.0) < 1e-12);
  CHECK(error(output_after(batch, ctrlora::kLossTermsTokens, "sum"), sum / matrix(batch.total())) <
        1e-12);
  CHECK(error(output_after(batch, ctrlora::kLossTermsSequences, "sum"), sum / 3.0) < 1e-12);
  CHECK(error(output_after(batch, 7, "sum"), sum / 7.0) < 1e-12);
}

TEST_CASE("a summed loss gives the same S as its mean") {
  at::manual_seed(2);
  const Batch mean = Batch::random(12);
  const std::vector<std::pair<int64_t, at::Tensor>> cases = {
      {ctrlora::kLossTermsTokens, mean.total()},
      {ctrlora::kLossTermsSequences, at::full({kLayers}, 3.0, at::kDouble)},
      {40, at::full({kLayers}, 40.0, at::kDouble)}};
  for (const auto& [terms, count] : cases) {
    Batch sum = mean;
    sum.g = mean.g * matrix(count);
    CHECK(error(output_after(sum, terms, "sum"), output_after(mean, terms, "mean")) < 1e-12);
  }
}

TEST_CASE("a base that nobody hands over has unit gain: |W0|^2 = (m / n) tr Omega") {
  at::manual_seed(3);
  const Options options;
  KroneckerFactors factors = started(options);
  for (int step = 0; step < 3; ++step) {
    CurvatureSketch unknown = sketch(factors, Batch::random(12));
    unknown.base_square = at::full({kLayers}, -1.0, at::kDouble);
    factors.commit(unknown, options);
    CHECK(error(factors.base_square, factors.input.trace() * (double{kOut} / kIn)) < 1e-14);
    CHECK(same_bits(factors.absolute, flags(true)));
  }
}

TEST_CASE("the gradient proxy is normalised to a mean eigenvalue of 1 and has no absolute scale") {
  at::manual_seed(4);
  const Options options;
  const Batch small = Batch::random(12);
  Batch large = small;
  large.x = small.x * 1e3;
  large.g = small.g * 1e-4;
  std::vector<KroneckerFactors> both;
  for (const Batch& batch : {small, large}) {
    KroneckerFactors factors = started(options);
    factors.commit(sketch(factors, batch, /*proxy=*/true), options);
    const auto unit = [&](const at::Tensor& rows) {
      const at::Tensor moment = batch.moment(rows);
      return moment * (rows.size(-1) / moment.diagonal(0, -2, -1).sum(-1)).view({-1, 1, 1});
    };
    CHECK(error(factors.input.to_dense(), unit(batch.x)) < 1e-12);
    CHECK(error(factors.output.to_dense(), unit(batch.g)) < 1e-12);
    CHECK(error(factors.base_square, at::full({kLayers}, double{kOut}, at::kDouble)) < 1e-13);
    CHECK(same_bits(factors.absolute, flags(false)));
    CHECK(same_bits(factors.seen, at::ones({kLayers}, at::kDouble)));
    both.push_back(factors);
  }
  CHECK(error(both[0].input.to_dense(), both[1].input.to_dense()) < 1e-12);
  CHECK(error(both[0].output.to_dense(), both[1].output.to_dense()) < 1e-12);
}

TEST_CASE("the first observation starts the averages anew, layer by layer") {
  at::manual_seed(5);
  const Options options;
  KroneckerFactors factors = started(options);
  for (int step = 0; step < 3; ++step) {
    factors.commit(sketch(factors, Batch::random(12), /*proxy=*/true), options);
  }
  const Batch batch = Batch::random(12);
  CurvatureSketch first = sketch(factors, batch);
  first.from_gradient = numbers({0.0, 1.0}) > 0;  // layer 1 stays on the proxy
  factors.commit(first, options);
  CHECK(same_bits(factors.seen, numbers({1.0, 4.0})));
  CHECK(same_bits(factors.absolute, numbers({1.0, 0.0}) > 0));
  CHECK(error(factors.input.to_dense()[0], (batch.moment(batch.x) / matrix(batch.total()))[0]) <
        1e-12);
  CHECK(error(factors.output.to_dense()[0], (batch.moment(batch.g) * matrix(batch.total()))[0]) <
        1e-12);
  CHECK(error(factors.base_square,
              at::stack({((batch.base * batch.weights).sum(-1) / batch.total())[0],
                         at::full({}, double{kOut}, at::kDouble)})) < 1e-13);
  factors.commit(sketch(factors, Batch::random(12)), options);
  CHECK(same_bits(factors.seen, numbers({2.0, 1.0})));
}

TEST_CASE("a batch that says nothing about one factor enters neither") {
  at::manual_seed(6);
  const Options options;
  KroneckerFactors factors = started(options);
  factors.commit(sketch(factors, Batch::random(12)), options);
  const std::vector<at::Tensor> before = state(factors);
  const Batch batch = Batch::random(12);
  const at::Tensor first = numbers({0.0, 1.0}).view({2, 1, 1});
  const auto check = [&](const CurvatureSketch& partial) {
    factors.commit(partial, options);
    CHECK(same_layer(factors, before, 0));
  };
  Batch no_input = batch, no_gradient = batch, no_rows = batch, infinite = batch;
  no_input.x = batch.x * first;  // gradA from B = 0, say
  no_gradient.g = batch.g * first;
  no_rows.weights = batch.weights * first.view({2, 1});
  infinite.g = at::where(first > 0, batch.g, std::numeric_limits<double>::infinity());
  check(sketch(factors, no_input));
  check(sketch(factors, no_gradient));
  check(sketch(factors, no_rows));
  check(sketch(factors, infinite));
  CHECK(same_bits(factors.seen, numbers({1.0, 5.0})));
}

TEST_CASE("commits through a slice reach these layers alone") {
  at::manual_seed(7);
  const Options options;
  KroneckerFactors factors = started(options);
  const std::vector<at::Tensor> before = state(factors);
  const CurvatureSketch whole = sketch(factors, Batch::random(12));
  const auto part = [](const ctrlora::FactorSketch& sums) {
    return ctrlora::FactorSketch{sums.product.slice(0, 1, 2), sums.trace.slice(0, 1, 2),
                                 sums.weight.slice(0, 1, 2)};
  };
  KroneckerFactors view = factors.slice(1, 2);
  view.commit({part(whole.input), part(whole.output), whole.base_square.slice(0, 1, 2),
               whole.sequences.slice(0, 1, 2), whole.from_gradient.slice(0, 1, 2)},
              options);
  CHECK(same_layer(factors, before, 0));
  KroneckerFactors both = started(options);
  both.commit(whole, options);
  CHECK(error(factors.input.to_dense()[1], both.input.to_dense()[1]) < 1e-12);
  CHECK(same_bits(factors.seen, numbers({0.0, 1.0})));
}

TEST_CASE("several shapes in one call end as each alone, bit for bit, one of them broken") {
  at::manual_seed(9);
  Options options;
  options.sketch_rank = 3;
  options.loss_terms = ctrlora::kLossTermsSequences;
  std::vector<KroneckerFactors::Commit> parts;
  std::vector<KroneckerFactors> alone;
  // Sketch ranks (in, out) of 3 and 3, 3 and complete, complete and complete, 3 and 3.
  for (const auto& [layers, in, out] :
       std::vector<std::array<int64_t, 3>>{{2, 6, 5}, {1, 5, 3}, {3, 2, 3}, {2, 5, 6}}) {
    const at::Tensor all = at::ones({layers}, at::kBool);
    const at::Tensor x = randn({layers, 9, in}), g = randn({layers, 9, out});
    const at::Tensor weights = at::rand({layers, 9}, at::kDouble) + 0.5;
    KroneckerFactors factors(layers, in, out, options, at::kDouble), twin = factors;
    for (KroneckerFactors* own : {&factors, &twin}) {
      *own = KroneckerFactors(layers, in, out, options, at::kDouble);
      own->input.start_basis(x, all, 0);
      own->output.start_basis(g, all, 0);
    }
    CurvatureSketch sums{factors.input.sketch(x, weights), factors.output.sketch(g, weights),
                         at::rand({layers}, at::kDouble), at::full({layers}, 3.0, at::kDouble),
                         at::zeros({layers}, at::kBool)};
    sums.from_gradient[0].fill_(in == 2);
    if (in == 6) {
      sums.input.product[1].fill_(std::numeric_limits<double>::infinity());
    }
    parts.push_back({factors, sums});
    alone.push_back(twin);
  }
  for (int step = 0; step < 3; ++step) {
    KroneckerFactors::commit_all(parts, options);
    for (size_t i = 0; i < parts.size(); ++i) {
      CAPTURE(i);
      alone[i].commit(parts[i].sketch, options);
      for (int64_t layer = 0; layer < alone[i].seen.size(0); ++layer) {
        CHECK(same_layer(alone[i], state(parts[i].factors), layer));
      }
    }
  }
  // Nothing entered where a sum was infinite.
  CHECK(same_bits(parts[0].factors.input.eigenvalues()[1], at::ones({3}, at::kDouble)));
}

TEST_CASE("failed decompositions are counted, keep the old factor, and one success forgets them") {
  at::manual_seed(8);
  Options options;
  options.sketch_rank = 2;
  KroneckerFactors factors = started(options);
  factors.commit(sketch(factors, Batch::random(12)), options);
  const at::Tensor before = factors.output.to_dense();
  for (int64_t failure = 1; failure <= 3; ++failure) {
    CurvatureSketch broken = sketch(factors, Batch::random(12));
    // No sum of rows: U^T Y is negative definite.
    broken.output.product = at::cat(
        {factors.output.basis().slice(0, 0, 1) * -1e6, broken.output.product.slice(0, 1, 2)});
    factors.commit(broken, options);
    CHECK(same_bits(factors.misses, at::tensor({failure, int64_t{0}}, at::kLong)));
    CHECK(same_bits(factors.output.to_dense()[0], before[0]));
  }
  factors.commit(sketch(factors, Batch::random(12)), options);
  CHECK(same_bits(factors.misses, at::zeros({kLayers}, at::kLong)));
  CHECK_FALSE(same_bits(factors.output.to_dense()[0], before[0]));
}

TEST_CASE("state is named once, live, and moves with its basis' dtype") {
  KroneckerFactors factors = started(Options{});
  std::vector<std::string> names;
  for (const auto& item : factors.named_tensors()) {
    names.push_back(item.first);
  }
  CHECK(names == std::vector<std::string>{"base_square", "seen", "absolute", "factor_misses",
                                          "input.basis", "input.eigenvalues", "input.trace",
                                          "output.basis", "output.eigenvalues", "output.trace"});
  factors.named_tensors()[1].second.fill_(3.0);
  CHECK(same_bits(factors.seen, at::full({kLayers}, 3.0, at::kDouble)));
  factors.to(at::TensorOptions().dtype(at::kFloat));
  CHECK((factors.input.basis().scalar_type() == at::kFloat));
  CHECK((factors.output.basis().scalar_type() == at::kFloat));
  CHECK((factors.base_square.scalar_type() == at::kDouble));
}
