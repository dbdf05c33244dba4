// Small batched linear algebra that never throws on bad numbers. (L, ., .) throughout.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>

#include <vector>

namespace ctrlora::detail {

/// What all numerics run under: no autograd graph, no autocast, no TF32. One per public entry.
class NumericsGuard {
 public:
  NumericsGuard();
  ~NumericsGuard();
  NumericsGuard(const NumericsGuard&) = delete;
  NumericsGuard& operator=(const NumericsGuard&) = delete;

 private:
  struct Guards;
  Guards* guards_;
};

/// (L) bool: every entry of a layer's tensor is finite.
at::Tensor finite_layers(const at::Tensor& x);

/// Rows of `yes` where mask (L) holds, else of `no`.
at::Tensor select_layers(const at::Tensor& mask, const at::Tensor& yes, const at::Tensor& no);

/// (L) reshaped to broadcast over a (L, ., .) tensor.
inline at::Tensor as_column(const at::Tensor& x) {
  return x.unsqueeze(-1).unsqueeze(-1);
}

/// One tensor field of several structs, along the layer dimension.
template <typename T>
at::Tensor cat(const std::vector<T>& parts, at::Tensor T::* field) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(parts.size());
  for (const T& part : parts) {
    tensors.push_back(part.*field);
  }
  return at::cat(tensors, 0);
}

/// Tensors along the layer dimension; a single one as it is.
at::Tensor below(const std::vector<at::Tensor>& parts);

/// The same of field(part) for several structs.
template <typename T, typename Field>
at::Tensor joined(const std::vector<T>& parts, const Field& field) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(parts.size());
  for (const T& part : parts) {
    tensors.push_back(field(part));
  }
  return below(tensors);
}

/// Sum of x * y over all but the layer dimension.
at::Tensor inner(const at::Tensor& x, const at::Tensor& y);

/// Whether every entry of a bool tensor holds, as far as that can be told without synchronising: on
/// a CPU the entries are in our memory, elsewhere the answer is no.
bool known_to_be_true(const at::Tensor& mask);

/// One step of an EMA with its weight, in place: biased sum and the sum of its coefficients, for
/// the layers in `live` (L) bool. All (L) float64.
void ema(const at::Tensor& value,
         const at::Tensor& weight,
         const at::Tensor& sample,
         const at::Tensor& live,
         double beta);

/// The smallest trace of a sum of rows that products in this dtype can tell from nothing.
double smallest_trace(int64_t size, at::ScalarType dtype);

/// How many times its running mean a sample may be before it is a spike: five times the length
/// (cpp/README.md, section 6).
inline constexpr double kSpike = 25.0;

/// The sample, at most kSpike times the mean; as it is where the mean is 0 or not `known`.
at::Tensor bounded_sample(const at::Tensor& sample,
                          const at::Tensor& mean,
                          const at::Tensor& known);

/// (L, r) float64: 1 where a direction has neither a B column nor an A row, going by its Grams.
at::Tensor zero_directions(const at::Tensor& gram_b, const at::Tensor& gram_a);

struct Cholesky {
  at::Tensor factor;  // (L, r, r) lower
  at::Tensor ok;      // (L) bool; elsewhere factor = I
};

/// Cholesky of a symmetric matrix with the ladder of cpp/README.md, section 6: plain, then with
/// relative jitter 10, 100, 1000 times `eps` on the diagonal. Non-finite input comes out as not ok.
Cholesky robust_cholesky(const at::Tensor& gram, double eps);

/// Inverse from a lower Cholesky factor.
at::Tensor cholesky_inverse(const at::Tensor& factor);

struct Eigh {
  at::Tensor values;   // (L, r) ascending
  at::Tensor vectors;  // (L, r, r)
};

/// Symmetric eigendecomposition; layers with non-finite input are decomposed as I (mask
/// beforehand); where LAPACK does not converge the values are NaN and the vectors I.
Eigh symmetric_eigh(const at::Tensor& matrix);

/// Square root of a Gram V diag(e) V^T, largest first; directions that are but rounding are zero.
struct GramRoot {
  at::Tensor vectors;  // (L, p, p) V
  at::Tensor root;     // (L, p, p) V e^1/2
  at::Tensor inverse;  // (L, p, p) V e^-1/2
};

/// @param rounding relative eigenvalue below which a direction counts as nothing.
GramRoot gram_root(const at::Tensor& gram, double rounding);

struct OrthonormalMap {
  at::Tensor map;  // (L, k, k) float64
  at::Tensor ok;   // (L) bool; elsewhere some invertible map
};

/// Map that makes columns with this Gram (L, k, k) orthonormal, up to the Gram's rounding times its
/// condition number: Cholesky-QR with columns scaled to unit length. @param eps rounding unit of
/// the columns' dtype.
OrthonormalMap orthonormal_map(const at::Tensor& gram, double eps);

struct Orthonormal {
  at::Tensor basis;  // (L, d, k)
  at::Tensor ok;     // (L) bool
};

/// CholeskyQR2 with column scaling (Yamamoto et al. 2015): two passes, each one Gram and one
/// product.
Orthonormal orthonormalize(const at::Tensor& columns);

}  // namespace ctrlora::detail
