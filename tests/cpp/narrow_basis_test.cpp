// Bases kept in bfloat16: half the memory, the same numbers as their widened copies.
#include <string>
#include <vector>

#include "ctrlora/kronecker_factors.h"
#include "ctrlora/low_rank_eigen.h"
#include "ctrlora/tangent_step.h"
#include "problems.h"

namespace {

using ctrlora::KroneckerFactors;
using ctrlora::LowRankEigen;
using ctrlora::SideProducts;
using problems::dense;
using problems::error;
using problems::positive;
using problems::randn;
using problems::rows_of;
using problems::same_bits;

/// A factor of two layers that saw a batch, its basis kept narrow or not.
LowRankEigen seen(const at::Tensor& rows, int64_t k, bool wide, bool narrow, int64_t batches = 4) {
  LowRankEigen factor(rows.size(0), rows.size(2), k, rows.options(), wide, narrow);
  const at::Tensor layers = at::ones({rows.size(0)}, at::kDouble);
  factor.start_basis(rows, layers.to(at::kBool), 0);
  const at::Tensor weights = at::ones({rows.size(0), rows.size(1)}, at::kDouble);
  for (int64_t i = 0; i < batches; ++i) {
    const at::Tensor keep = layers * (1.0 - 1.0 / static_cast<double>(i + 1));
    const at::Tensor failed = factor.update(factor.sketch(rows, weights), keep, layers);
    CHECK_FALSE(failed.any().item<bool>());
  }
  return factor;
}

}  // namespace

TEST_CASE("a narrow basis takes half the memory and stays close to the wide one's matrix") {
  at::manual_seed(0);
  const at::Tensor rows = rows_of(positive(2, 24), 96).to(at::kFloat);
  for (const bool wide : {false, true}) {
    for (const int64_t k : {int64_t{4}, int64_t{12}, int64_t{24}}) {
      const LowRankEigen own = seen(rows, k, wide, /*narrow=*/true);
      const LowRankEigen truth = seen(rows, k, wide, /*narrow=*/false);
      CHECK((own.basis().scalar_type() == at::kBFloat16));
      CHECK((own.dtype() == at::kFloat));
      CHECK((own.computed_basis().scalar_type() == at::kFloat));
      CHECK(2 * own.basis().nbytes() == truth.basis().nbytes());
      CHECK((own.slice(1, 2).dtype() == at::kFloat));
      CHECK(error(own.trace(), truth.trace()) < 1e-6);
      CHECK(error(own.eigenvalues(), truth.eigenvalues()) < 2e-2);
      CHECK(error(own.to_dense(), dense(truth)) < 2e-2);
      CHECK(error(own.to_dense(), dense(truth)) > 1e-5);  // it is narrow
    }
  }
}

TEST_CASE("rounding does not pile up over refreshes") {
  at::manual_seed(1);
  const at::Tensor rows = rows_of(positive(2, 24), 96).to(at::kFloat);
  const at::Tensor few = dense(seen(rows, 8, true, false, 100));
  CHECK(error(seen(rows, 8, true, true, 100).to_dense(), few) < 2e-2);
}

TEST_CASE("products and steps with a narrow basis are those with its widened copy, bit for bit") {
  at::manual_seed(2);
  const auto columns_first = [](const at::Tensor& x) { return x.mT().contiguous().mT(); };
  for (const int64_t size : {int64_t{5}, int64_t{130}, int64_t{2051}}) {  // whole chunks and rests
    for (const int64_t r : {int64_t{4}, int64_t{5}}) {                    // kernels, and ATen's
      const auto slab = [&](int64_t columns) { return randn({3, size, columns}, at::kFloat); };
      const at::Tensor w = slab(r), m = slab(r);
      const at::Tensor u = slab(4).to(at::kBFloat16);
      const auto check = [](const at::Tensor& weight, const at::Tensor& momentum,
                            const at::Tensor& basis) {
        const SideProducts own = ctrlora::side_products(weight, momentum, basis);
        const SideProducts truth = ctrlora::side_products(weight, momentum, basis.to(at::kFloat));
        CHECK(same_bits(own.uw, truth.uw));
        CHECK(same_bits(own.um, truth.um));
        CHECK(same_bits(own.ww, truth.ww));
        CHECK(same_bits(own.wm, truth.wm));
        CHECK(same_bits(own.mm, truth.mm));
        CHECK(own.uw.abs().sum().item<double>() > 0.0);
      };
      check(w, m, u);
      check(columns_first(w), columns_first(m), columns_first(u));
    }
  }
}

TEST_CASE("float64 factors stay wide, and a move to float64 widens") {
  KroneckerFactors factors;
  ctrlora::Options options;
  options.basis_dtype = "bfloat16";
  factors = KroneckerFactors(2, 12, 20, options, at::kDouble);
  CHECK((factors.input.basis().scalar_type() == at::kDouble));
  factors = KroneckerFactors(2, 12, 20, options, at::kFloat);
  CHECK((factors.input.basis().scalar_type() == at::kBFloat16));
  CHECK((factors.output.basis().scalar_type() == at::kBFloat16));
  factors.to(at::TensorOptions(at::kFloat));
  CHECK((factors.output.basis().scalar_type() == at::kBFloat16));
  factors.to(at::TensorOptions(at::kDouble));
  CHECK((factors.output.basis().scalar_type() == at::kDouble));
  CHECK((factors.output.dtype() == at::kDouble));
  options = ctrlora::Options();
  factors = KroneckerFactors(2, 12, 20, options, at::kFloat);
  CHECK((factors.input.basis().scalar_type() == at::kFloat));
}
