// The fused layer as operators of torch's dispatcher, for compilers: torch.ops.ctrlora.lora_linear
// and its backward. A compiler sees two opaque calls with a known shape (Meta), and rows are
// observed inside them, when the compiled code runs. cpp/README.md, section 8.
//
// Eager code takes the node of lora_linear.cpp, which is one call less and twice differentiable.
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>

#include "detail/check.h"
#include "detail/lora_kernels.h"

namespace ctrlora {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kForward = "ctrlora::lora_linear";
constexpr const char* kBackward = "ctrlora::lora_linear_backward";

// ---- The capture's way from the forward to the backward: the second output, a tensor of one byte
// ---- whose memory owns it. It lives as long as the graph keeps what it saved for backward,
// ---- recomputed forwards bring their own, and a copy of the byte carries nothing.

struct CaptureOwner {
  at::Tensor byte;
  std::shared_ptr<Capture> capture;
};

void release(void* owner) {
  delete static_cast<CaptureOwner*>(owner);  // NOLINT(cppcoreguidelines-owning-memory)
}

at::Tensor carry(std::shared_ptr<Capture> capture, const at::Tensor& like) {
  at::Tensor byte = at::zeros({1}, like.options().dtype(at::kByte));
  if (capture == nullptr) {
    return byte;
  }
  auto owner = std::make_unique<CaptureOwner>(CaptureOwner{byte, std::move(capture)});
  c10::DataPtr data(byte.mutable_data_ptr(), owner.release(), &release, byte.device());
  const c10::Storage storage(c10::Storage::use_byte_size_t(), 1, std::move(data), nullptr, false);
  return at::empty({0}, byte.options()).set_(storage, 0, {1}, {1});
}

std::shared_ptr<Capture> carried(const at::Tensor& byte) {
  if (!byte.has_storage() || byte.storage().data_ptr().get_deleter() != &release) {
    return nullptr;
  }
  return static_cast<CaptureOwner*>(byte.storage().data_ptr().get_context())->capture;
}

// ---- Kernels ----

using Forward = std::tuple<at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

at::Tensor oriented(const at::Tensor& weight, bool transposed) {
  return transposed ? weight.t() : weight;
}

Forward forward_kernel(const at::Tensor& inputs,
                       const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias,
                       const at::Tensor& a,
                       const at::Tensor& b,
                       double scaling,
                       int64_t slot,
                       bool transposed) {
  detail::LoraOutput out =
      detail::lora_forward(inputs, oriented(weight, transposed), bias, a, b, scaling,
                           slot > 0 ? ObservationSlot::find(slot) : nullptr, inputs);
  return {out.output, carry(std::move(out.capture), inputs)};
}

Gradients backward_kernel(const at::Tensor& grad,
                          const at::Tensor& inputs,
                          const at::Tensor& weight,
                          const at::Tensor& a,
                          const at::Tensor& b,
                          const at::Tensor& capture,
                          double scaling,
                          bool transposed,
                          std::array<bool, 3> needed) {
  if (const std::shared_ptr<Capture> waiting = carried(capture)) {
    waiting->complete(grad, inputs);
  }
  detail::LoraGradients out =
      detail::lora_backward(grad, inputs, oriented(weight, transposed), a, b, scaling, needed);
  for (at::Tensor* unneeded : {&out.inputs, &out.a, &out.b}) {
    if (!unneeded->defined()) {
      *unneeded = at::empty({0}, grad.options());
    }
  }
  return {out.inputs, out.a, out.b};
}

// ---- Shapes alone ----

Forward forward_meta(const at::Tensor& inputs,
                     const at::Tensor& /*weight*/,
                     const std::optional<at::Tensor>& /*bias*/,
                     const at::Tensor& a,
                     const at::Tensor& b,
                     double /*scaling*/,
                     c10::SymInt /*slot*/,  // NOLINT(performance-unnecessary-value-param): schema
                     bool /*transposed*/) {
  CTRLORA_CHECK(a.dim() == 2 && b.dim() == 2 && inputs.dim() >= 1, kForward,
                "expected inputs (..., n), a (r, n), b (m, r); got inputs ", inputs.sym_sizes(),
                ", a ", a.sym_sizes(), ", b ", b.sym_sizes(), ".");
  c10::SymDimVector shape(inputs.sym_sizes().begin(), inputs.sym_sizes().end());
  shape.back() = b.sym_size(0);
  return {at::empty_symint(shape, inputs.options()),
          at::empty({1}, inputs.options().dtype(at::kByte))};
}

Gradients backward_meta(const at::Tensor& grad,
                        const at::Tensor& inputs,
                        const at::Tensor& /*weight*/,
                        const at::Tensor& a,
                        const at::Tensor& b,
                        const at::Tensor& /*capture*/,
                        double /*scaling*/,
                        bool /*transposed*/,
                        std::array<bool, 3> needed) {
  const auto like = [&](const at::Tensor& x, bool wanted) {
    return wanted ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, grad.options());
  };
  return {like(inputs, needed[0]), like(a, needed[1]), like(b, needed[2])};
}

// ---- Calls through the dispatcher, which a tracer records ----

Forward call_forward(const at::Tensor& inputs,
                     const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias,
                     const at::Tensor& a,
                     const at::Tensor& b,
                     double scaling,
                     c10::SymInt slot,
                     bool transposed) {
  using Signature = Forward(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                            const at::Tensor&, const at::Tensor&, double, c10::SymInt, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(kForward, "").typed<Signature>();
  return op.call(inputs, weight, bias, a, b, scaling, std::move(slot), transposed);
}

Gradients call_backward(const at::Tensor& grad,
                        const variable_list& saved,
                        double scaling,
                        bool transposed,
                        std::array<bool, 3> needed) {
  using Signature =
      Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                const at::Tensor&, const at::Tensor&, double, bool, std::array<bool, 3>);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(kBackward, "").typed<Signature>();
  return op.call(grad, saved[0], saved[1], saved[2], saved[3], saved[4], scaling, transposed,
                 needed);
}

// ---- Autograd ----

struct LoraOperatorFunction : torch::autograd::Function<LoraOperatorFunction> {
  // What may need a gradient comes first: the edges are inputs, a, b. The base is frozen.
  static variable_list forward(AutogradContext* ctx,
                               const at::Tensor& inputs,
                               const at::Tensor& a,
                               const at::Tensor& b,
                               const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias,
                               double scaling,
                               c10::SymInt slot,
                               bool transposed) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [output, capture] =
        call_forward(inputs, weight, bias, a, b, scaling, std::move(slot), transposed);
    ctx->save_for_backward({inputs, weight, a, b, capture});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["transposed"] = transposed;
    ctx->mark_non_differentiable({capture});
    ctx->set_materialize_grads(false);
    return {output, capture};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const bool transposed = ctx->saved_data["transposed"].toBool();
    const std::array<bool, 3> needed = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                        ctx->needs_input_grad(2)};
    variable_list out(8);
    if (!grads[0].defined()) {
      return out;
    }
    if (at::GradMode::is_enabled()) {  // this backward is differentiated: by ATen's own operators
      if (const std::shared_ptr<Capture> waiting = carried(saved[4])) {
        waiting->complete(grads[0], saved[0]);
      }
      const detail::LoraGradients found = detail::lora_backward(
          grads[0], saved[0], oriented(saved[1], transposed), saved[2], saved[3], scaling, needed);
      out[0] = found.inputs;
      out[1] = found.a;
      out[2] = found.b;
      return out;
    }
    const auto found = call_backward(grads[0], saved, scaling, transposed, needed);
    out[0] = needed[0] ? std::get<0>(found) : at::Tensor();
    out[1] = needed[1] ? std::get<1>(found) : at::Tensor();
    out[2] = needed[2] ? std::get<2>(found) : at::Tensor();
    return out;
  }
};

Forward forward_autograd(const at::Tensor& inputs,
                         const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias,
                         const at::Tensor& a,
                         const at::Tensor& b,
                         double scaling,
                         c10::SymInt slot,
                         bool transposed) {
  const variable_list out = LoraOperatorFunction::apply(inputs, a, b, weight.detach(), bias,
                                                        scaling, std::move(slot), transposed);
  return {out[0], out[1]};
}

// As torch's linear: all operands in autocast's dtype.
Forward forward_autocast(const at::Tensor& inputs,
                         const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias,
                         const at::Tensor& a,
                         const at::Tensor& b,
                         double scaling,
                         c10::SymInt slot,
                         bool transposed) {
  const at::DeviceType device = inputs.device().type();
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return call_forward(at::autocast::cached_cast(dtype, inputs, device),
                      at::autocast::cached_cast(dtype, weight, device),
                      at::autocast::cached_cast(dtype, bias, device), a, b, scaling,
                      std::move(slot), transposed);
}

TORCH_LIBRARY(ctrlora, m) {
  m.def(
      "lora_linear(Tensor inputs, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scaling, "
      "SymInt slot, bool transposed) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lora_linear_backward(Tensor grad, Tensor inputs, Tensor weight, Tensor a, Tensor b, "
      "Tensor capture, float scaling, bool transposed, bool[3] needed) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctrlora, CompositeExplicitAutograd, m) {
  m.impl("lora_linear", &forward_kernel);
  m.impl("lora_linear_backward", &backward_kernel);
}

TORCH_LIBRARY_IMPL(ctrlora, Meta, m) {
  m.impl("lora_linear", &forward_meta);
  m.impl("lora_linear_backward", &backward_meta);
}

TORCH_LIBRARY_IMPL(ctrlora, Autograd, m) {
  m.impl("lora_linear", &forward_autograd);
}

TORCH_LIBRARY_IMPL(ctrlora, AutocastCPU, m) {
  m.impl("lora_linear", &forward_autocast);
}

TORCH_LIBRARY_IMPL(ctrlora, AutocastCUDA, m) {
  m.impl("lora_linear", &forward_autocast);
}

TORCH_LIBRARY_IMPL(ctrlora, AutocastXPU, m) {
  m.impl("lora_linear", &forward_autocast);
}

}  // namespace

}  // namespace ctrlora
