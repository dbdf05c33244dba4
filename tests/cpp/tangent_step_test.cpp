#include "ctrlora/tangent_step.h"

#include <limits>
#include <utility>
#include <vector>

#include "problems.h"

namespace {

using at::matmul;
using ctrlora::LowRankEigen;
using ctrlora::SideMetric;
using ctrlora::SideProducts;
using ctrlora::SideStep;
using ctrlora::StepGrams;
using ctrlora::TangentStep;
using problems::dense;
using problems::dense_power;
using problems::error;
using problems::numbers;
using problems::randn;
using problems::same_bits;

constexpr double kEps = 1e-16;
constexpr double kFloor = 1e-4;
constexpr double kDamping = 0.01;

struct Problem {
  at::Tensor a, b, grad_a, grad_b, scaling;  // (L,r,n), (L,m,r), their gradients, (L)
  LowRankEigen omega, s;
  double whitening = 0.5;
  double floor = kFloor;

  static Problem random(int64_t layers, int64_t m, int64_t n, int64_t r, int64_t k) {
    Problem out;
    out.a = randn({layers, r, n});
    out.b = randn({layers, m, r}) * 0.1;
    out.omega = factor(layers, n, k);
    out.s = factor(layers, m, k);
    out.scaling = at::rand({layers}, at::kDouble) + 0.5;
    out.set_gradient(randn({layers, m, n}));
    return out;
  }
  static LowRankEigen factor(int64_t layers, int64_t size, int64_t k) {
    const at::Tensor rows = problems::rows_of(problems::positive(layers, size), 60);
    LowRankEigen out(layers, size, k, at::kDouble);
    out.start_basis(rows, at::ones({layers}, at::kBool), 0);
    const auto sums = out.sketch(rows, at::ones({layers, 60}, at::kDouble));
    out.update(sums, at::zeros({layers}, at::kDouble), at::ones({layers}, at::kDouble));
    return out;
  }
  /// Gradients of a and b for the gradient (L, m, n) of W = W0 + s b a.
  void set_gradient(const at::Tensor& full) {
    grad_a = matmul(b.mT(), full) * scaling.view({-1, 1, 1});
    grad_b = matmul(full, a.mT()) * scaling.view({-1, 1, 1});
  }
  [[nodiscard]] SideProducts input() const {
    return ctrlora::side_products(a.mT(), grad_a.mT(), omega.basis());
  }
  [[nodiscard]] SideProducts output() const { return ctrlora::side_products(b, grad_b, s.basis()); }
  [[nodiscard]] SideMetric input_metric() const {
    return SideMetric::of(omega, whitening, kDamping);
  }
  [[nodiscard]] SideMetric output_metric() const { return SideMetric::of(s, whitening, kDamping); }
  [[nodiscard]] TangentStep step() const {
    return ctrlora::tangent_step(input(), input_metric(), output(), output_metric(), scaling, floor,
                                 kEps);
  }
};

/// delta A (L,r,n) and delta B (L,m,r).
struct Deltas {
  at::Tensor a, b;
  /// s (B dA + dB A).
  [[nodiscard]] at::Tensor change(const Problem& own) const {
    return (matmul(own.b, a) + matmul(b, own.a)) * own.scaling.view({-1, 1, 1});
  }
};

Deltas materialized(const Problem& own, const TangentStep& step) {
  return {step.a.materialize(own.a.mT(), own.grad_a.mT(), own.omega.basis()).mT(),
          step.b.materialize(own.b, own.grad_b, own.s.basis())};
}

Deltas deltas(const Problem& own) {
  return materialized(own, own.step());
}

/// cpp/README.md, section 3, with dense matrices.
Deltas textbook(const Problem& own) {
  const at::Tensor s = dense(own.s), omega = dense(own.omega);
  const at::Tensor p = matmul(own.b.mT(), matmul(dense_power(s, own.whitening, kDamping), own.b));
  at::Tensor q = matmul(own.a, matmul(dense_power(omega, own.whitening, kDamping), own.a.mT()));
  q = q + at::diag_embed(q.diagonal(0, -2, -1)) * 4 * kEps;
  const at::Tensor q_inverse = at::linalg_inv(q);
  const at::Tensor trace = matmul(p, q).diagonal(0, -2, -1).sum(-1).view({-1, 1, 1});
  const double rank = static_cast<double>(p.size(-1));
  const at::Tensor p_floored = at::linalg_inv(p + (trace * own.floor / rank + 1e-60) * q_inverse);
  const at::Tensor p_inverse = matmul(p_floored, matmul(p, p_floored));
  const at::Tensor over = -1 / own.scaling.square().view({-1, 1, 1});
  const at::Tensor left =
      dense_power(s, -own.whitening, kDamping) - 0.5 * matmul(own.b, matmul(p_inverse, own.b.mT()));
  const at::Tensor right = dense_power(omega, -own.whitening, kDamping) -
                           0.5 * matmul(own.a.mT(), matmul(q_inverse, own.a));
  return {over * matmul(p_inverse, matmul(own.grad_a, right)),
          over * matmul(left, matmul(own.grad_b, q_inverse))};
}

at::Tensor product(const at::Tensor& x, const at::Tensor& y) {
  return (x * y).sum({1, 2});
}

}  // namespace

TEST_CASE("the five products are those of the dense slabs, for any sizes, strides and dtypes") {
  at::manual_seed(0);
  const auto columns_first = [](const at::Tensor& x) { return x.mT().contiguous().mT(); };
  const auto check = [](const at::Tensor& w, const at::Tensor& m, const at::Tensor& u) {
    const SideProducts products = ctrlora::side_products(w, m, u);
    const double tolerance = w.scalar_type() == at::kDouble ? 1e-13 : 1e-5;
    const auto gram = [](const at::Tensor& x, const at::Tensor& y) {
      return matmul(x.to(at::kDouble).mT(), y.to(at::kDouble));
    };
    CHECK(error(products.ww, gram(w, w)) < tolerance);
    CHECK(error(products.uw, gram(u, w)) < tolerance);
    CHECK(error(products.um, gram(u, m)) < tolerance);
    CHECK(error(products.wm, gram(w, m)) < tolerance);
    CHECK(error(products.mm, gram(m, m)) < tolerance);
    CHECK((products.mm.scalar_type() == at::kDouble));
  };
  for (const int64_t size : {1, 7, 64, 1024, 2500}) {
    for (const auto& [rank, sketch] : {std::pair<int64_t, int64_t>{1, 1},
                                       {3, 5},
                                       {4, 1},
                                       {8, 16},
                                       {12, 7},
                                       {16, 16},
                                       {20, 3},
                                       {36, 16},
                                       {64, 24}}) {
      CAPTURE(size);
      CAPTURE(rank);
      for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
        const at::Tensor w = at::rand({2, size, rank}, dtype), m = at::rand({2, size, rank}, dtype);
        const at::Tensor u = at::rand({2, size, sketch}, dtype);
        check(w, m, u);
        check(columns_first(w), columns_first(m), columns_first(u));
        check(columns_first(w), m, u);
        check(w.repeat({1, 1, 2}).slice(2, 0, rank), m, u);  // rows with gaps
      }
    }
  }
}

TEST_CASE("products follow a scaled or another momentum, and slices") {
  at::manual_seed(1);
  const at::Tensor w = randn({3, 11, 4}), m = randn({3, 11, 4}), u = randn({3, 11, 5});
  const at::Tensor factor = numbers({-2.0, 0.0, 0.5});
  const SideProducts scaled = ctrlora::side_products(w, m, u).scale_momentum(factor);
  SideProducts other = ctrlora::side_products(w, randn({3, 11, 4}), u);
  other.set_momentum(w, m * factor.view({-1, 1, 1}), u);
  const SideProducts truth = ctrlora::side_products(w, m * factor.view({-1, 1, 1}), u);
  for (const SideProducts& own : {scaled, other}) {
    CHECK(error(own.ww, truth.ww) < 1e-14);
    CHECK(error(own.uw, truth.uw) < 1e-14);
    CHECK(error(own.um, truth.um) < 1e-14);
    CHECK(error(own.wm, truth.wm) < 1e-14);
    CHECK(error(own.mm, truth.mm) < 1e-14);
  }
  CHECK(same_bits(truth.slice(1, 3).um, truth.um.slice(0, 1, 3)));
  CHECK(same_bits(truth.slice(1, 3).ww, truth.ww.slice(0, 1, 3)));
}

TEST_CASE("the step is the textbook formula with dense matrices") {
  at::manual_seed(2);
  for (const int64_t k : {3, 8}) {  // low rank, complete for n
    for (const double whitening : {0.0, 0.25, 0.5, 1.0}) {
      Problem own = Problem::random(3, 12, 8, 3, k);
      own.whitening = whitening;
      const TangentStep step = own.step();
      CHECK(step.ok.all().item<bool>());
      const Deltas got = materialized(own, step), expected = textbook(own);
      CHECK(error(got.a, expected.a) < 1e-10);
      CHECK(error(got.b, expected.b) < 1e-10);
      const at::Tensor decrease =
          -(product(own.grad_a, expected.a) + product(own.grad_b, expected.b));
      CHECK(error(step.predicted_decrease, decrease) < 1e-10);
      CHECK((step.predicted_decrease >= 0).all().item<bool>());
    }
  }
}

TEST_CASE("with whitening 0 the metric plays no role") {
  at::manual_seed(3);
  Problem own = Problem::random(2, 9, 7, 3, 4);
  own.whitening = 0.0;
  Problem other = own;
  other.omega = LowRankEigen(2, 7, 4, at::kDouble);
  other.s = LowRankEigen(2, 9, 4, at::kDouble);
  CHECK(error(deltas(own).a, deltas(other).a) < 1e-12);
  CHECK(error(deltas(own).b, deltas(other).b) < 1e-12);
}

TEST_CASE("the step is the metric's projection of the preconditioned gradient") {
  at::manual_seed(4);
  Problem own = Problem::random(2, 9, 7, 3, 4);
  own.floor = 1e-15;
  const at::Tensor full = randn({2, 9, 7});
  own.set_gradient(full);
  const at::Tensor s = dense_power(dense(own.s), 0.5, kDamping);
  const at::Tensor omega = dense_power(dense(own.omega), 0.5, kDamping);
  const at::Tensor wish = -matmul(at::linalg_inv(s), matmul(full, at::linalg_inv(omega)));
  const at::Tensor missed = matmul(s, matmul(wish - deltas(own).change(own), omega));
  const double scale = full.abs().max().item<double>();
  // Orthogonal to every B E + F A.
  CHECK(matmul(own.b.mT(), missed).abs().max().item<double>() < 1e-9 * scale);
  CHECK(matmul(missed, own.a.mT()).abs().max().item<double>() < 1e-9 * scale);
  CHECK(missed.abs().max().item<double>() > 1e-3 * scale);  // there is a rest outside
}

TEST_CASE("the change of W does not depend on the gauge or on the scaling") {
  at::manual_seed(5);
  const Problem own = Problem::random(3, 12, 8, 3, 4);
  const at::Tensor change = deltas(own).change(own);
  Problem turned = own;
  const at::Tensor map = randn({3, 3, 3}) + 2 * at::eye(3, at::kDouble);
  const at::Tensor inverse = at::linalg_inv(map);
  turned.a = matmul(map, own.a);
  turned.b = matmul(own.b, inverse);
  turned.grad_a = matmul(inverse.mT(), own.grad_a);
  turned.grad_b = matmul(own.grad_b, map.mT());
  CHECK(error(deltas(turned).change(turned), change) < 1e-9);
  CHECK(error(turned.step().predicted_decrease, own.step().predicted_decrease) < 1e-9);

  Problem scaled = own;
  const at::Tensor by = numbers({0.01, 8.0, -3.0});
  scaled.scaling = own.scaling * by;
  scaled.b = own.b / by.view({-1, 1, 1});
  scaled.grad_b = own.grad_b * by.view({-1, 1, 1});
  CHECK(error(deltas(scaled).change(scaled), change) < 1e-9);
}

TEST_CASE("from B = 0 the step leaves A exactly alone and moves B as the formula says") {
  at::manual_seed(6);
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    for (const bool old_momentum : {false, true}) {
      Problem own = Problem::random(2, 9, 7, 3, 4);
      own.b.zero_();
      own.set_gradient(randn({2, 9, 7}));
      if (old_momentum) {  // of a B that was reset to zero
        own.grad_a = randn({2, 3, 7});
      }
      const Deltas expected = textbook(own);
      for (at::Tensor* slab : {&own.a, &own.b, &own.grad_a, &own.grad_b}) {
        *slab = slab->to(dtype);
      }
      own.omega.to(at::TensorOptions().dtype(dtype));
      own.s.to(at::TensorOptions().dtype(dtype));
      const TangentStep step = own.step();
      CHECK(step.ok.all().item<bool>());
      CHECK((step.predicted_decrease > 0).all().item<bool>());
      CHECK(same_bits(materialized(own, step).a, at::zeros_like(own.a)));
      CHECK(error(materialized(own, step).b, expected.b) < (dtype == at::kDouble ? 1e-11 : 1e-4));
    }
  }
}

TEST_CASE("a rank-deficient B and a zero gradient are no failures") {
  at::manual_seed(7);
  Problem own = Problem::random(2, 9, 7, 3, 4);
  own.b.select(2, 1).zero_();
  own.set_gradient(randn({2, 9, 7}));
  const TangentStep step = own.step();
  CHECK(step.ok.all().item<bool>());
  CHECK((step.predicted_decrease >= 0).all().item<bool>());
  CHECK(error(deltas(own).b, textbook(own).b) < 1e-8);

  own.set_gradient(at::zeros({2, 9, 7}, at::kDouble));
  CHECK(own.step().ok.all().item<bool>());
  CHECK(same_bits(deltas(own).change(own), at::zeros({2, 9, 7}, at::kDouble)));
  CHECK(error(own.step().predicted_decrease, at::zeros({2}, at::kDouble)) == 0.0);
}

TEST_CASE("step Grams equal those of the materialised step") {
  at::manual_seed(8);
  const Problem own = Problem::random(3, 12, 8, 3, 4);
  const TangentStep step = own.step();
  const Deltas delta = materialized(own, step);
  const auto check = [](const StepGrams& got, const at::Tensor& metric, const at::Tensor& w,
                        const at::Tensor& d) {
    CHECK(error(got.ww, matmul(w.mT(), matmul(metric, w))) < 1e-11);
    CHECK(error(got.wd, matmul(w.mT(), matmul(metric, d))) < 1e-11);
    CHECK(error(got.dd, matmul(d.mT(), matmul(metric, d))) < 1e-11);
  };
  const SideMetric in = own.input_metric(), out = own.output_metric();
  const at::Tensor a = own.a.mT(), da = delta.a.mT();
  const ctrlora::PlainStepGrams input = ctrlora::step_grams(own.input(), step.a);
  const ctrlora::PlainStepGrams output = ctrlora::step_grams(own.output(), step.b);
  check(input.in(in.plain), dense(own.omega), a, da);
  check(input.in(in.whiten), dense_power(dense(own.omega), 0.5, kDamping), a, da);
  check(output.in(out.plain), dense(own.s), own.b, delta.b);
  check(output, at::eye(12, at::kDouble), own.b, delta.b);
  CHECK(error(output.ud, matmul(own.s.basis().mT(), delta.b)) < 1e-11);
  const StepGrams part = output.slice(1, 3).in(out.slice(1, 3).plain);
  CHECK(same_bits(part.dd, output.in(out.plain).dd.slice(0, 1, 3)));
  CHECK(error(ctrlora::weighted_gram(out.whiten, own.output().uw, own.output().ww),
              matmul(own.b.mT(), matmul(dense_power(dense(own.s), 0.5, kDamping), own.b))) < 1e-11);
}

TEST_CASE("a bad layer is not ok; the others are as they would be without it") {
  at::manual_seed(9);
  const Problem own = Problem::random(3, 12, 8, 3, 4);
  const TangentStep expected = own.step();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  const auto check = [&](const Problem& bad) {
    const TangentStep step = bad.step();
    CHECK(same_bits(step.ok, numbers({1.0, 0.0, 1.0}) > 0));
    for (const int64_t l : {0, 2}) {
      CHECK(same_bits(step.a.momentum[l], expected.a.momentum[l]));
      CHECK(same_bits(step.a.basis[l], expected.a.basis[l]));
      CHECK(same_bits(step.a.weight[l], expected.a.weight[l]));
      CHECK(same_bits(step.b.momentum[l], expected.b.momentum[l]));
      CHECK(same_bits(step.b.basis[l], expected.b.basis[l]));
      CHECK(same_bits(step.b.weight[l], expected.b.weight[l]));
      CHECK(same_bits(step.predicted_decrease[l], expected.predicted_decrease[l]));
    }
  };
  for (const double value : {nan, inf}) {
    for (at::Tensor Problem::* slab :
         {&Problem::a, &Problem::b, &Problem::grad_a, &Problem::grad_b}) {
      Problem bad = own;
      bad.*slab = (own.*slab).clone();
      (bad.*slab).select(0, 1).select(0, 1).select(0, 2).fill_(value);
      check(bad);
    }
  }
  Problem indefinite = own;  // A = 0: Q = 0 has no Cholesky factor at any relative jitter
  indefinite.a = own.a.clone();
  indefinite.a.select(0, 1).zero_();
  check(indefinite);
}

TEST_CASE("a batch equals its layers one by one") {
  at::manual_seed(10);
  const Problem own = Problem::random(4, 12, 8, 3, 4);
  const Deltas all = deltas(own);
  for (int64_t l = 0; l < 4; ++l) {
    const auto part = [&](const at::Tensor& x) { return x.slice(0, l, l + 1); };
    const TangentStep step =
        ctrlora::tangent_step(own.input().slice(l, l + 1), own.input_metric().slice(l, l + 1),
                              own.output().slice(l, l + 1), own.output_metric().slice(l, l + 1),
                              part(own.scaling), kFloor, kEps);
    CHECK(error(step.b.materialize(part(own.b), part(own.grad_b), part(own.s.basis())),
                part(all.b)) < 1e-12);
    CHECK(
        error(step.a.materialize(part(own.a).mT(), part(own.grad_a).mT(), part(own.omega.basis())),
              part(all.a).mT()) < 1e-12);
  }
}

TEST_CASE("directions that are off change nothing: as if the pair had fewer") {
  at::manual_seed(14);
  const Problem small = Problem::random(2, 9, 8, 3, 4);
  Problem padded = small;
  const auto with_zeros = [](const at::Tensor& x, int64_t dim) {
    const at::Tensor zero = at::zeros_like(x.narrow(dim, 0, 1));
    return at::cat({zero, x.narrow(dim, 0, 2), zero, x.narrow(dim, 2, 1)}, dim);
  };
  padded.a = with_zeros(small.a, 1);
  padded.b = with_zeros(small.b, 2);
  padded.grad_a = with_zeros(small.grad_a, 1);
  padded.grad_b = with_zeros(small.grad_b, 2);
  const TangentStep step = padded.step();
  CHECK(step.ok.all().item<bool>());
  const Deltas got = deltas(padded);
  const Deltas expected = deltas(small);
  CHECK(error(got.a, with_zeros(expected.a, 1)) < 1e-12);
  CHECK(error(got.b, with_zeros(expected.b, 2)) < 1e-12);
  for (const int64_t off : {0, 3}) {
    CHECK((got.a.select(1, off) == 0).all().item<bool>());
    CHECK((got.b.select(2, off) == 0).all().item<bool>());
  }
  CHECK(error(step.predicted_decrease, small.step().predicted_decrease) < 1e-12);
}
