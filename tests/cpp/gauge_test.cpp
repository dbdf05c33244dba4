#include "ctrlora/gauge.h"

#include <limits>
#include <vector>

#include "problems.h"

namespace {

using at::matmul;
using ctrlora::GaugeMap;
using problems::error;
using problems::numbers;
using problems::positive;
using problems::randn;
using problems::same_bits;

struct Problem {
  at::Tensor a, b, momentum_a, momentum_b;  // (L,r,n), (L,m,r), momenta
  at::Tensor omega, s;                      // (L,n,n), (L,m,m) metric

  static Problem random(int64_t layers, int64_t m, int64_t n, int64_t r) {
    return {randn({layers, r, n}), randn({layers, m, r}) * 0.1, randn({layers, r, n}),
            randn({layers, m, r}), positive(layers, n),         positive(layers, m)};
  }
  [[nodiscard]] at::Tensor p() const { return matmul(b.mT(), matmul(s, b)); }
  [[nodiscard]] at::Tensor q() const { return matmul(a, matmul(omega, a.mT())); }
  [[nodiscard]] at::Tensor product() const { return matmul(b, a); }
  /// The balanced copy; this object keeps its own tensors.
  [[nodiscard]] Problem balanced(const GaugeMap& gauge) const {
    Problem out = *this;
    for (at::Tensor* slab : {&out.a, &out.b, &out.momentum_a, &out.momentum_b}) {
      *slab = slab->clone();
    }
    ctrlora::apply_gauge(gauge, out.a, out.b, out.momentum_a, out.momentum_b);
    return out;
  }
  [[nodiscard]] Problem balanced() const { return balanced(ctrlora::balance(p(), q())); }
};

at::Tensor inner_product(const at::Tensor& x, const at::Tensor& y) {
  return (x * y).sum({1, 2});
}

at::Tensor identity(int64_t layers, int64_t size) {
  return at::eye(size, at::kDouble).expand({layers, size, size});
}

}  // namespace

TEST_CASE("BA stays, and both Grams become the same diagonal") {
  at::manual_seed(0);
  const Problem own = Problem::random(3, 9, 7, 4);
  const GaugeMap gauge = ctrlora::balance(own.p(), own.q());
  const Problem after = own.balanced(gauge);
  CHECK(gauge.ok.all().item<bool>());
  CHECK(error(after.product(), own.product()) < 1e-12);
  const at::Tensor sigma = at::diag_embed(gauge.sigma);
  CHECK(error(after.p(), sigma) < 1e-11);
  CHECK(error(after.q(), sigma) < 1e-11);
  CHECK(error(matmul(gauge.map, gauge.inverse), identity(3, 4)) < 1e-11);
  CHECK((gauge.sigma.slice(1, 0, 3) >= gauge.sigma.slice(1, 1, 4)).all().item<bool>());
}

TEST_CASE("sigma are the singular values of the whitened product") {
  at::manual_seed(1);
  const Problem own = Problem::random(3, 9, 7, 4);
  const at::Tensor whitened = matmul(at::linalg_cholesky(own.s).mT(),
                                     matmul(own.product(), at::linalg_cholesky(own.omega)));
  const at::Tensor values = at::linalg_svdvals(whitened).slice(1, 0, 4);
  CHECK(error(ctrlora::balance(own.p(), own.q()).sigma, values) < 1e-11);
}

TEST_CASE("a balanced layer is balanced already") {
  at::manual_seed(2);
  const Problem once = Problem::random(3, 9, 7, 4).balanced();
  const GaugeMap again = ctrlora::balance(once.p(), once.q());
  // Up to the signs of the eigenvectors.
  CHECK(error(again.map.abs(), identity(3, 4)) < 1e-6);
  CHECK(error(once.balanced(again).p(), once.p()) < 1e-11);
}

TEST_CASE("momenta move so that every directional derivative stays") {
  at::manual_seed(3);
  const Problem own = Problem::random(3, 9, 7, 4);
  const GaugeMap gauge = ctrlora::balance(own.p(), own.q());
  const Problem after = own.balanced(gauge);
  const at::Tensor da = randn({3, 4, 7}), db = randn({3, 9, 4});
  const at::Tensor moved_a = matmul(gauge.map, da), moved_b = matmul(db, gauge.inverse);
  CHECK(error(inner_product(after.momentum_a, moved_a), inner_product(own.momentum_a, da)) < 1e-11);
  CHECK(error(inner_product(after.momentum_b, moved_b), inner_product(own.momentum_b, db)) < 1e-11);
  // The moved tangent vector is the same change of W.
  CHECK(error(matmul(after.b, moved_a) + matmul(moved_b, after.a),
              matmul(own.b, da) + matmul(db, own.a)) < 1e-11);
}

TEST_CASE("gradients of the product stay gradients") {
  at::manual_seed(4);
  Problem own = Problem::random(3, 9, 7, 4);
  const at::Tensor full = randn({3, 9, 7});
  own.momentum_a = matmul(own.b.mT(), full);
  own.momentum_b = matmul(full, own.a.mT());
  const Problem after = own.balanced();
  CHECK(error(after.momentum_a, matmul(after.b.mT(), full)) < 1e-10);
  CHECK(error(after.momentum_b, matmul(full, after.a.mT())) < 1e-10);
}

TEST_CASE("layers without a product or with bad numbers keep their gauge bit for bit") {
  at::manual_seed(5);
  const Problem good = Problem::random(5, 9, 7, 4);
  const Problem expected = good.balanced();
  Problem own = good;
  own.b = good.b.clone();
  own.b.select(0, 1).zero_();  // as after initialisation
  own.a = good.a.clone();
  own.a.select(0, 2).zero_();
  at::Tensor p = own.p(), q = own.q();
  p.select(0, 3).fill_(std::numeric_limits<double>::quiet_NaN());
  q.select(0, 4).neg_();
  const GaugeMap gauge = ctrlora::balance(p, q);
  CHECK(same_bits(gauge.ok, numbers({1.0, 0.0, 0.0, 0.0, 0.0}) > 0));
  CHECK(same_bits(gauge.map.slice(0, 1), identity(4, 4)));
  CHECK(same_bits(gauge.inverse.slice(0, 1), identity(4, 4)));
  const Problem after = own.balanced(gauge);
  CHECK(same_bits(after.a.slice(0, 1), own.a.slice(0, 1)));
  CHECK(same_bits(after.b.slice(0, 1), own.b.slice(0, 1)));
  CHECK(same_bits(after.momentum_a.slice(0, 1), own.momentum_a.slice(0, 1)));
  CHECK(same_bits(after.momentum_b.slice(0, 1), own.momentum_b.slice(0, 1)));
  CHECK(error(after.a[0], expected.a[0]) < 1e-12);
  CHECK(error(after.b[0], expected.b[0]) < 1e-12);
}

TEST_CASE("a rank-deficient B keeps finite factors and its product") {
  at::manual_seed(6);
  for (const int64_t dead : {1, 3}) {
    Problem own = Problem::random(2, 9, 7, 4);
    own.b = matmul(randn({2, 9, 4 - dead}), randn({2, 4 - dead, 4}));
    const GaugeMap gauge = ctrlora::balance(own.p(), own.q());
    const Problem after = own.balanced(gauge);
    CHECK(gauge.ok.all().item<bool>());
    CHECK(error(after.product(), own.product()) < 1e-9);
    CHECK(after.a.isfinite().all().item<bool>());
    CHECK(after.momentum_b.isfinite().all().item<bool>());
    const at::Tensor share = gauge.sigma / gauge.sigma.slice(1, 0, 1);
    CHECK((share.slice(1, 4 - dead) < 1e-6).all().item<bool>());
    CHECK((share.slice(1, 0, 4 - dead) > 1e-6).all().item<bool>());
  }
}

TEST_CASE("very uneven factors are balanced: B tiny, A huge") {
  at::manual_seed(7);
  Problem own = Problem::random(2, 9, 7, 4);
  own.b = own.b * 1e-9;
  own.a = own.a * 1e6;
  const Problem after = own.balanced();
  CHECK(error(after.product(), own.product()) < 1e-12);
  CHECK(error(after.p(), after.q()) < 1e-11);
}

TEST_CASE("components below a hundredth of the largest keep rows of A of usable size") {
  at::manual_seed(11);
  Problem own = Problem::random(2, 9, 7, 4);
  own.b = own.b * numbers({1.0, 1e-1, 1e-3, 1e-5});
  const GaugeMap gauge = ctrlora::balance(own.p(), own.q());
  const at::Tensor floored = at::maximum(gauge.sigma, 0.01 * gauge.sigma.slice(1, 0, 1));
  CHECK((gauge.sigma < floored).any().item<bool>());
  const Problem after = own.balanced(gauge);
  CHECK(error(after.product(), own.product()) < 1e-12);
  CHECK(error(after.q(), at::diag_embed(floored)) < 1e-11);
  CHECK(error(after.p(), at::diag_embed(gauge.sigma.square() / floored)) < 1e-11);
}

TEST_CASE("a batch equals its layers one by one") {
  at::manual_seed(8);
  const Problem own = Problem::random(4, 9, 7, 4);
  const GaugeMap all = ctrlora::balance(own.p(), own.q());
  for (int64_t l = 0; l < 4; ++l) {
    const auto part = [&](const at::Tensor& x) { return x.slice(0, l, l + 1); };
    const GaugeMap alone = ctrlora::balance(part(own.p()), part(own.q()));
    CHECK(error(alone.sigma, part(all.sigma)) < 1e-13);
    CHECK(error(alone.map, part(all.map)) < 1e-11);
  }
}

TEST_CASE("slabs of float32 and bfloat16 keep their dtype and their product") {
  at::manual_seed(9);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Problem own = Problem::random(2, 9, 7, 4);
    const GaugeMap gauge = ctrlora::balance(own.p(), own.q());
    at::Tensor a = own.a.to(dtype), b = own.b.to(dtype);
    at::Tensor momentum_a = own.momentum_a.to(at::kFloat),
               momentum_b = own.momentum_b.to(at::kFloat);
    const void* home = a.const_data_ptr();
    ctrlora::apply_gauge(gauge, a, b, momentum_a, momentum_b);
    CHECK((a.scalar_type() == dtype));
    CHECK((momentum_a.scalar_type() == at::kFloat));
    CHECK(a.const_data_ptr() == home);  // in place: parameters are views of it
    const double tolerance = dtype == at::kFloat ? 1e-5 : 3e-2;
    CHECK(error(matmul(b.to(at::kDouble), a.to(at::kDouble)), own.product()) < tolerance);
    CHECK(error(momentum_a, own.balanced(gauge).momentum_a) < 1e-5);
  }
}

TEST_CASE("LibTorch's batched decompositions equal looped ones") {
  at::manual_seed(10);
  const at::Tensor gram = positive(16, 8, 2.0);
  const auto [factor, info] = at::linalg_cholesky_ex(gram);
  const auto [values, vectors] = at::linalg_eigh(gram);
  const at::Tensor right = randn({16, 8, 5});
  const at::Tensor solved = at::linalg_solve_triangular(factor, right, /*upper=*/false);
  const at::Tensor inverse = at::cholesky_inverse(factor);
  CHECK(same_bits(info, at::zeros({16}, at::kInt)));
  for (int64_t l = 0; l < 16; ++l) {
    const auto [factor_l, info_l] = at::linalg_cholesky_ex(gram[l]);
    CHECK(error(factor_l, factor[l]) < 1e-14);
    CHECK(error(at::linalg_solve_triangular(factor_l, right[l], false), solved[l]) < 1e-12);
    CHECK(error(at::cholesky_inverse(factor_l), inverse[l]) < 1e-12);
    const auto [values_l, vectors_l] = at::linalg_eigh(gram[l]);
    CHECK(error(values_l, values[l]) < 1e-13);
    CHECK(error(matmul(vectors_l * values_l, vectors_l.mT()), gram[l]) < 1e-13);
    CHECK(error(matmul(vectors[l] * values[l], vectors[l].mT()), gram[l]) < 1e-13);
  }
  // One bad matrix is reported, not thrown, and leaves its neighbours alone.
  at::Tensor broken = gram.clone();
  broken.select(0, 5).neg_();
  const auto [rest, codes] = at::linalg_cholesky_ex(broken);
  CHECK(same_bits(codes != 0, at::arange(16) == 5));
  CHECK(same_bits(rest[4], factor[4]));
  CHECK(same_bits(rest[6], factor[6]));
}

TEST_CASE("balance: directions that are off come last and stay exactly zero") {
  at::manual_seed(5);
  Problem problem = Problem::random(3, 9, 8, 5);
  for (at::Tensor* slab : {&problem.a, &problem.momentum_a}) {
    slab->select(1, 0).zero_();
    slab->select(1, 3).zero_();
  }
  for (at::Tensor* slab : {&problem.b, &problem.momentum_b}) {
    slab->select(2, 0).zero_();
    slab->select(2, 3).zero_();
  }
  problem.b.select(2, 1).zero_();  // on, but grown just now
  const GaugeMap gauge = ctrlora::balance(problem.p(), problem.q());
  CHECK(gauge.ok.all().item<bool>());
  const Problem got = problem.balanced(gauge);
  CHECK(error(got.product(), problem.product()) < 1e-12);
  CHECK((got.a.slice(1, 3) == 0).all().item<bool>());
  CHECK((got.b.slice(2, 3) == 0).all().item<bool>());
  CHECK((got.momentum_a.slice(1, 3) == 0).all().item<bool>());
  CHECK((got.momentum_b.slice(2, 3) == 0).all().item<bool>());
  CHECK((got.a.slice(1, 0, 3).norm(2, 2) > 1e-3).all().item<bool>());
  const at::Tensor sigma = gauge.sigma.slice(1, 0, 2);
  const at::Tensor p = got.p().slice(1, 0, 2).slice(2, 0, 2);
  CHECK(error(p, at::diag_embed(sigma)) < 1e-10);
}
