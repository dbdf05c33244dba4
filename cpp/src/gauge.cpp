#include "ctrlora/gauge.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/maximum.h>

#include "detail/small_matrix.h"
#include "detail/tensor_math.h"

namespace ctrlora {

using at::bmm;
using detail::select_layers;
using detail::small_bmm;

GaugeMap balance(const at::Tensor& gram_b, const at::Tensor& gram_a) {
  const detail::NumericsGuard guard;
  constexpr double kEps = 1e-15;
  const at::Tensor identity = at::eye(gram_a.size(-1), gram_a.options()).expand_as(gram_a);
  // Inactive directions are kept apart from the others by the eigenvalue -1, which sorts last.
  const at::Tensor off = detail::zero_directions(gram_b, gram_a);
  const detail::Cholesky cholesky = detail::robust_cholesky(gram_a + at::diag_embed(off), kEps);
  const at::Tensor whitened = small_bmm(cholesky.factor.mT(), small_bmm(gram_b, cholesky.factor));
  const detail::Eigh eigh = detail::symmetric_eigh(whitened - at::diag_embed(off));
  const at::Tensor sigma = eigh.values.clamp_min(0).sqrt().flip(-1);  // descending
  const at::Tensor apart = off.unsqueeze(-1) == std::get<0>(off.sort(-1)).unsqueeze(-2);
  const at::Tensor vectors = eigh.vectors.flip(-1) * apart;  // what is zero is exactly zero
  const at::Tensor largest = sigma.select(-1, 0);
  const at::Tensor root = at::maximum(sigma, 1e-2 * largest.unsqueeze(-1)).sqrt();

  const at::Tensor unwhiten =
      at::linalg_solve_triangular(cholesky.factor, identity, /*upper=*/false);
  const at::Tensor map = root.unsqueeze(-1) * small_bmm(vectors.mT(), unwhiten);
  const at::Tensor inverse = small_bmm(cholesky.factor, vectors) / root.unsqueeze(-2);
  const at::Tensor ok = cholesky.ok.logical_and(detail::finite_layers(whitened))
                            .logical_and(largest > 0)
                            .logical_and(detail::finite_layers(map))
                            .logical_and(detail::finite_layers(inverse));
  return {select_layers(ok, map, identity), select_layers(ok, inverse, identity), sigma, ok};
}

void apply_gauge(const GaugeMap& gauge,
                 const at::Tensor& a,
                 const at::Tensor& b,
                 const at::Tensor& momentum_a,
                 const at::Tensor& momentum_b) {
  const detail::NumericsGuard guard;
  const at::ScalarType dtype = momentum_a.scalar_type();
  const at::Tensor map = gauge.map.to(dtype);
  const at::Tensor inverse = gauge.inverse.to(dtype);
  const auto keep = [&](const at::Tensor& slab, const at::Tensor& moved) {
    slab.copy_(select_layers(gauge.ok, moved.to(slab.scalar_type()), slab));
  };
  keep(a, bmm(map, a.to(dtype)));
  keep(b, bmm(b.to(dtype), inverse));
  keep(momentum_a, bmm(inverse.mT(), momentum_a));
  keep(momentum_b, bmm(momentum_b, map.mT()));
}

}  // namespace ctrlora
