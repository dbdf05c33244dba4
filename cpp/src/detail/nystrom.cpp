#include "detail/nystrom.h"

#include <ATen/ops/diag_embed.h>
#include <ATen/ops/linalg_solve_triangular.h>

#include <cmath>

#include "detail/small_matrix.h"
#include "detail/tall_skinny.h"
#include "detail/tensor_math.h"

namespace ctrlora::detail {

at::Tensor symmetric(const at::Tensor& x) {
  return (x + x.mT()) * 0.5;
}

JointGram::JointGram(const Slabs& bases, const Slabs& fresh) {
  std::vector<at::Tensor> joint, own;
  joint.reserve(bases.size());
  own.reserve(bases.size());
  for (size_t i = 0; i < bases.size(); ++i) {
    std::vector<at::Tensor> grams =
        tall_grams({{{bases[i], fresh[i]}, fresh[i]}, {{bases[i]}, bases[i]}});
    joint.push_back(std::move(grams[0]));
    own.push_back(std::move(grams[1]));
  }
  const int64_t k = bases.front().size(2);
  const at::Tensor of_both = below(joint);
  uy = of_both.slice(1, 0, k);
  yy = of_both.slice(1, k);
  uu = below(own);
}

Nystrom nystrom(const Slabs& bases, const Slabs& fresh, const at::Tensor& kept) {
  const double eps = bases.front().scalar_type() == at::kDouble ? 1e-15 : 1e-7;
  const JointGram gram(bases, fresh);
  const at::Tensor up = gram.uu * kept.unsqueeze(1) + gram.uy;       // U^T P
  const at::Tensor yp = gram.uy.mT() * kept.unsqueeze(1) + gram.yy;  // Y^T P
  const at::Tensor core = symmetric(up);
  const at::Tensor square =  // (L, k) of P's columns
      (kept.unsqueeze(-1) * up + yp).diagonal(0, -2, -1).clamp_min(0);

  // Columns C_j = (P_j + mu_j U_j) / (K_jj + mu_j) are near orthonormal when U is warm. What lies
  // below mu need not be told apart: the damping's size, or what a Gram can tell from rounding.
  constexpr double kMu = 0.01;
  const at::Tensor mu = (square.sqrt() * std::sqrt(10 * eps)).clamp_min(kMu);
  const at::Tensor unit = 1 / (core.diagonal(0, -2, -1).clamp_min(0) + mu);
  const at::Tensor of_u = ((kept + mu) * unit).unsqueeze(-1);
  const at::Tensor of_y = unit.unsqueeze(-1);
  const at::Tensor cross = gram.uy * of_u * of_y.mT();
  const OrthonormalMap first = orthonormal_map(
      gram.uu * of_u * of_u.mT() + cross + cross.mT() + gram.yy * of_y * of_y.mT(), eps);
  Nystrom out;
  out.of_fresh = of_y * first.map;
  out.of_basis = of_u * first.map;
  to_range(bases, fresh, out);  // Z = C first
  std::vector<at::Tensor> grams;
  grams.reserve(bases.size());
  for (size_t i = 0; i < bases.size(); ++i) {
    grams.push_back(tall_grams({{{bases[i], fresh[i]}, fresh[i]}}).front());
  }
  const at::Tensor joint = below(grams);
  const at::Tensor uz = joint.slice(1, 0, kept.size(1));
  const at::Tensor zz = joint.slice(1, kept.size(1));
  const OrthonormalMap second = orthonormal_map(zz, eps);

  // Of F + nu I, and nu taken off again (Tropp et al. 2017, algorithm 3): where F has next to
  // nothing, K is the rounding of its large entries, which K^-1 would blow up. Z^T P by way of
  // P = C / unit - mu U, C = Z first^-1, for the same reason: not from the Grams that made Z.
  const at::Tensor nu = square.sum(-1, /*keepdim=*/true).sqrt() * (4 * eps);  // (L, 1)
  const at::Tensor back =
      at::linalg_solve_triangular(first.map, at::diag_embed(1 / unit), /*upper=*/true);
  const at::Tensor projected =
      small_bmm(second.map.mT(), small_bmm(zz, back) - uz.mT() * (mu - nu).unsqueeze(-2));
  const Cholesky cholesky = robust_cholesky(core + gram.uu * nu.unsqueeze(-1), eps);
  const at::Tensor half =
      at::linalg_solve_triangular(cholesky.factor, projected.mT(), /*upper=*/false);
  const at::Tensor inside = small_bmm(half.mT(), half);
  const Eigh eigh = symmetric_eigh(inside);
  out.map = small_bmm(second.map, eigh.vectors);
  out.values = eigh.values - nu;
  out.ok = first.ok.logical_and(second.ok)
               .logical_and(cholesky.ok)
               .logical_and(finite_layers(inside))
               .logical_and(finite_layers(eigh.values));
  return out;
}

void to_range(const Slabs& bases, const Slabs& fresh, const Nystrom& of) {
  for_each(bases, [&](size_t i, int64_t begin, int64_t end) {
    tall_combine({{fresh[i], of.of_fresh.slice(0, begin, end)},
                  {bases[i], of.of_basis.slice(0, begin, end)}});
  });
}

}  // namespace ctrlora::detail
