// One warm Nystrom power iteration of several factors at once: what touches a slab runs slab by
// slab, all else on tensors below each other (cpp/README.md, sections 2 and 8).
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace ctrlora::detail {

/// Slabs (L_i, d_i, k) of several factors, whose small tensors lie below each other.
using Slabs = std::vector<at::Tensor>;

/// f(i, begin, end) for each slab and its layers.
template <typename F>
void for_each(const Slabs& slabs, const F& f) {
  int64_t begin = 0;
  for (size_t i = 0; i < slabs.size(); ++i) {
    const int64_t end = begin + slabs[i].size(0);
    f(i, begin, end);
    begin = end;
  }
}

/// (x + x^T) / 2.
at::Tensor symmetric(const at::Tensor& x);

/// Products of the present basis U and the new rows' part Y of F U, all (L, k, k).
struct JointGram {
  JointGram(const Slabs& bases, const Slabs& fresh);
  at::Tensor uu, uy, yy;
};

struct Nystrom {
  at::Tensor of_basis, of_fresh;  // (L, k, k): the range of P is U of_basis + Y of_fresh
  at::Tensor map;                 // (L, k, k): the new basis is range @ map
  at::Tensor values;              // (L, k)
  at::Tensor ok;                  // (L) bool
};

/// Nystrom approximation P K^-1 P^T of F from P = F U = U kept + Y, for F of mean eigenvalue 1.
/// Everything but two combinations of U and Y is rank-space algebra on their Grams.
/// @param fresh Y; becomes the range of P, orthonormal up to the second Cholesky-QR pass.
Nystrom nystrom(const Slabs& bases, const Slabs& fresh, const at::Tensor& kept);

/// fresh <- the range of P, as `nystrom` leaves it.
void to_range(const Slabs& bases, const Slabs& fresh, const Nystrom& of);

}  // namespace ctrlora::detail
