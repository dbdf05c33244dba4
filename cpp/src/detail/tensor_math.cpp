#include "detail/tensor_math.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cholesky_inverse.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/where.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "detail/small_matrix.h"
#include "detail/tall_skinny.h"

namespace ctrlora::detail {

struct NumericsGuard::Guards {
  at::NoGradGuard no_grad;
  at::NoTF32Guard no_tf32;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

NumericsGuard::NumericsGuard() : guards_(new Guards) {}
NumericsGuard::~NumericsGuard() {
  delete guards_;
}

at::Tensor below(const std::vector<at::Tensor>& parts) {
  return parts.size() == 1 ? parts.front() : at::cat(parts);
}

at::Tensor finite_layers(const at::Tensor& x) {
  // A sum is finite only if every entry is, up to overflow, which counts as not finite.
  // Over all dimensions at once: flattened, a transposed slab would be copied.
  std::vector<int64_t> inner(static_cast<size_t>(x.dim() - 1));
  std::iota(inner.begin(), inner.end(), 1);
  return at::isfinite(x.sum(inner));
}

at::Tensor select_layers(const at::Tensor& mask, const at::Tensor& yes, const at::Tensor& no) {
  std::vector<int64_t> shape(static_cast<size_t>(std::max(yes.dim(), no.dim())), 1);
  shape[0] = mask.size(0);
  return at::where(mask.view(shape), yes, no);
}

at::Tensor inner(const at::Tensor& x, const at::Tensor& y) {
  return (x * y).flatten(1).sum(-1);
}

bool known_to_be_true(const at::Tensor& mask) {
  if (!mask.is_cpu()) {
    return false;
  }
  const at::Tensor flat = mask.contiguous();
  const bool* begin = flat.const_data_ptr<bool>();
  return std::all_of(begin, begin + flat.numel(), [](bool holds) { return holds; });
}

namespace {

at::Tensor identity_like(const at::Tensor& matrix) {
  return at::eye(matrix.size(-1), matrix.options()).expand_as(matrix);
}

}  // namespace

void ema(const at::Tensor& value,
         const at::Tensor& weight,
         const at::Tensor& sample,
         const at::Tensor& live,
         double beta) {
  value.copy_(at::where(live, beta * value + (1 - beta) * sample, value));
  weight.copy_(at::where(live, beta * weight + (1 - beta), weight));
}

double smallest_trace(int64_t size, at::ScalarType dtype) {
  return static_cast<double>(size) * (dtype == at::kDouble ? 1e-290 : 1e-36);
}

at::Tensor bounded_sample(const at::Tensor& sample,
                          const at::Tensor& mean,
                          const at::Tensor& known) {
  const at::Tensor most = kSpike * mean;
  return at::where(known.logical_and(most > 0).logical_and(sample > most), most, sample);
}

at::Tensor zero_directions(const at::Tensor& gram_b, const at::Tensor& gram_a) {
  const auto zero = [](const at::Tensor& gram) { return gram.diagonal(0, -2, -1) == 0; };
  return zero(gram_b).logical_and(zero(gram_a)).to(gram_a.scalar_type());
}

Cholesky robust_cholesky(const at::Tensor& gram, double eps) {
  const at::Tensor finite = finite_layers(gram);
  const at::Tensor identity = identity_like(gram);
  const at::Tensor safe = select_layers(finite, gram, identity);
  auto [factor, info] = at::linalg_cholesky_ex(safe);
  at::Tensor ok = info.eq(0);
  double jitter = 10.0 * eps;
  for (int attempt = 0; attempt < 3 && !known_to_be_true(ok); ++attempt, jitter *= 10.0) {
    const at::Tensor shift = safe.diagonal(0, -2, -1).abs().mean(-1) * jitter;
    auto [retry, retry_info] = at::linalg_cholesky_ex(safe + as_column(shift) * identity);
    factor = select_layers(ok, factor, retry);
    ok = ok.logical_or(retry_info.eq(0));
  }
  ok = ok.logical_and(finite);
  return {select_layers(ok, factor, identity), ok};
}

at::Tensor cholesky_inverse(const at::Tensor& factor) {
  return at::cholesky_inverse(factor);
}

namespace {

// LAPACK's iteration did not converge for some layer, which torch tells by an exception alone.
Eigh eigh_one_by_one(const at::Tensor& matrix) {
  Eigh out{at::full_like(matrix.select(-1, 0), std::numeric_limits<double>::quiet_NaN()),
           identity_like(matrix).contiguous()};
  for (int64_t layer = 0; layer < matrix.size(0); ++layer) {
    try {
      auto [values, vectors] = at::linalg_eigh(matrix[layer]);
      out.values[layer].copy_(values);
      out.vectors[layer].copy_(vectors);
    } catch (const c10::LinAlgError&) {
      continue;  // NaN tells
    }
  }
  return out;
}

}  // namespace

Eigh symmetric_eigh(const at::Tensor& matrix) {
  const at::Tensor safe = select_layers(finite_layers(matrix), matrix, identity_like(matrix));
  const at::Tensor half = safe * 0.5;  // halved first: a sum of large numbers may overflow
  const at::Tensor symmetric = half + half.mT();
  try {
    auto [values, vectors] = at::linalg_eigh(symmetric);
    return {values, vectors};
  } catch (const c10::LinAlgError&) {
    return eigh_one_by_one(symmetric);
  }
}

GramRoot gram_root(const at::Tensor& gram, double rounding) {
  const Eigh eigh = symmetric_eigh(gram);
  const at::Tensor square = eigh.values.flip(-1);
  const at::Tensor vectors = eigh.vectors.flip(-1);
  const at::Tensor counts = (square > rounding * square.narrow(-1, 0, 1)).logical_and(square > 0);
  const at::Tensor zero = at::zeros({}, square.options());
  const at::Tensor root = at::where(counts, square, zero).sqrt();
  const at::Tensor inverse = at::where(counts, square.clamp_min(1e-300).rsqrt(), zero);
  return {vectors, vectors * root.unsqueeze(-2), vectors * inverse.unsqueeze(-2)};
}

OrthonormalMap orthonormal_map(const at::Tensor& gram, double eps) {
  const at::Tensor scale = gram.diagonal(0, -2, -1).clamp_min(1e-300).rsqrt();
  const at::Tensor unit = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2);
  const Cholesky cholesky = robust_cholesky(unit, eps);
  const at::Tensor inverse =
      at::linalg_solve_triangular(cholesky.factor, identity_like(gram), /*upper=*/false);
  return {scale.unsqueeze(-1) * inverse.mT(), cholesky.ok};
}

Orthonormal orthonormalize(const at::Tensor& columns) {
  const double eps = columns.scalar_type() == at::kDouble ? 1e-16 : 1e-7;
  at::Tensor basis = columns;
  at::Tensor ok;
  for (int pass = 0; pass < 2; ++pass) {
    const OrthonormalMap step = orthonormal_map(tall_gram(basis, basis), eps);
    basis = at::bmm(basis, step.map.to(basis.scalar_type()));
    ok = pass == 0 ? step.ok : ok.logical_and(step.ok);
  }
  return {basis, ok};
}

}  // namespace ctrlora::detail
