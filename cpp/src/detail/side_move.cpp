#include "detail/side_move.h"

#include <ATen/ops/minimum.h>

#include "detail/small_matrix.h"
#include "detail/tensor_math.h"

namespace ctrlora::detail {

SideMove SideMove::scaled(const SideStep& step,
                          const PlainStepGrams& grams,
                          const at::Tensor& f,
                          const at::Tensor& momentum_factor) {
  const at::Tensor length = as_column(f);
  SideMove out;
  out.step = {step.momentum * (length * as_column(momentum_factor)), step.basis * length,
              step.weight * length};
  out.grams = grams;
  out.grams.wd = grams.wd * length;
  out.grams.ud = grams.ud * length;
  out.grams.dd = grams.dd * length.square();
  return out;
}

void SideMove::decay(const PowerCoefficients& metric,
                     const at::Tensor& other,
                     const at::Tensor& rate,
                     const at::Tensor& scaling) {
  const at::Tensor s2 = scaling.square();
  // The trace bounds the largest eigenvalue of `other`: no direction loses more than half, so that
  // carried Grams keep their digits.
  const at::Tensor largest = metric.tail + metric.diag.amax(-1).clamp_min(0);
  const at::Tensor stiffest = s2 * largest * other.diagonal(0, -2, -1).sum(-1);
  const at::Tensor strength = at::minimum(rate, 0.5 / stiffest.clamp_min(1e-300)) * s2;
  const at::Tensor right = other * as_column(-strength);
  const at::Tensor weight = as_column(metric.tail) * right;                             // W K3
  const at::Tensor basis = small_bmm(metric.diag.unsqueeze(-1) * grams.uw, right);      // U K2
  const at::Tensor we = small_bmm(grams.ww, weight) + small_bmm(grams.uw.mT(), basis);  // W^T E
  const at::Tensor ue = small_bmm(grams.uw, weight) + basis;                            // U^T E
  const at::Tensor de = small_bmm(grams.wd.mT(), weight) + small_bmm(grams.ud.mT(), basis);
  const at::Tensor ee = small_bmm(weight.mT(), we) + small_bmm(basis.mT(), ue);
  step.weight = step.weight + weight;
  step.basis = step.basis + basis;
  grams.dd = grams.dd + de + de.mT() + ee;
  grams.wd = grams.wd + we;
  grams.ud = grams.ud + ue;
}

at::Tensor SideMove::carried_ww(const at::Tensor& keep) const {
  return keep.square() * grams.ww + keep * (grams.wd + grams.wd.mT()) + grams.dd;
}

at::Tensor SideMove::carried_uw(const at::Tensor& keep) const {
  return keep * grams.uw + grams.ud;
}

}  // namespace ctrlora::detail
