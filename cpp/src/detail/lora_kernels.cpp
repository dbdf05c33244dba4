#include "detail/lora_kernels.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

namespace ctrlora::detail {

at::Tensor as_rows(const at::Tensor& x) {
  return x.reshape({-1, x.size(-1)});
}

LoraOutput lora_forward(const at::Tensor& inputs,
                        const at::Tensor& weight,
                        const std::optional<at::Tensor>& base_or_bias,
                        const at::Tensor& a,
                        const at::Tensor& b,
                        double scaling,
                        const std::shared_ptr<ObservationSlot>& slot,
                        const at::Tensor& source) {
  const at::ScalarType dtype = inputs.scalar_type();
  const at::Tensor x = as_rows(inputs);
  const at::Tensor a_cast = a.to(dtype);
  const at::Tensor b_cast = b.to(dtype);
  at::Tensor y =
      weight.defined() ? at::linear(x, weight, base_or_bias) : as_rows(*base_or_bias).clone();
  LoraOutput out;
  if (slot != nullptr && slot->wanted()) {
    out.capture = slot->capture(source, y, /*saved=*/source.is_same(inputs));
  }
  const at::Tensor z = at::mm(x, a_cast.t());
  if (y.scalar_type() == dtype) {
    y.addmm_(z, b_cast.t(), 1, scaling);
  } else {
    y.add_(at::mm(z, b_cast.t()), scaling);
  }
  std::vector<int64_t> shape = inputs.sizes().vec();
  shape.back() = b.size(0);
  out.output = y.view(shape);
  return out;
}

LoraGradients lora_backward(const at::Tensor& grad,
                            const at::Tensor& inputs,
                            const at::Tensor& weight,
                            const at::Tensor& a,
                            const at::Tensor& b,
                            double scaling,
                            std::array<bool, 3> needed) {
  const at::Tensor x = as_rows(inputs);
  const auto [for_inputs, for_a, for_b] = needed;
  const at::Tensor g = as_rows(grad).to(x.scalar_type());
  const at::Tensor a_cast = a.to(x.scalar_type());
  at::Tensor gz;
  if (for_inputs || for_a) {
    gz = at::mm(g, b.to(x.scalar_type())) * scaling;
  }
  LoraGradients out;
  if (for_inputs) {
    at::Tensor gx = weight.defined() ? at::mm(g, weight).addmm_(gz, a_cast) : at::mm(gz, a_cast);
    out.inputs = gx.view(inputs.sizes());
  }
  if (for_a) {
    out.a = at::mm(gz.t(), x).to(a.scalar_type());
  }
  if (for_b) {
    out.b = (at::mm(g.t(), at::mm(x, a_cast.t())) * scaling).to(b.scalar_type());
  }
  return out;
}

}  // namespace ctrlora::detail
