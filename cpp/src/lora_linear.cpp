#include "ctrlora/lora_linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "detail/check.h"
#include "detail/lora_kernels.h"

namespace ctrlora {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Where to deliver observations, and the layer's inputs as the caller has them: under autocast each
// layer casts its own copy, and only by the original can layers tell that they share their inputs.
struct Watch {
  std::shared_ptr<ObservationSlot> slot;
  at::Tensor source;
};

// Nobody completes what a forward without gradients captures.
Watch watch(const std::shared_ptr<ObservationSlot>& slot, const at::Tensor& inputs) {
  return {at::GradMode::is_enabled() ? slot : nullptr, inputs};
}

// Saved: the inputs, a, b and, with the base inside, its weight. Nothing computed from them, so
// that a backward which is itself differentiated reaches them all.
struct LoraFunction : torch::autograd::Function<LoraFunction> {
  // Without a weight, base_or_bias is the base's output; else its bias, if it has one. Optionals,
  // not undefined tensors: the node reads dtype and device of every tensor it is given.
  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& inputs,
                            const at::Tensor& a,
                            const at::Tensor& b,
                            const std::optional<at::Tensor>& frozen_weight,
                            const std::optional<at::Tensor>& base_or_bias,
                            double scaling,
                            const Watch& watch) {
    const at::Tensor weight = frozen_weight.value_or(at::Tensor());
    const detail::LoraOutput out =
        detail::lora_forward(inputs, weight, base_or_bias, a, b, scaling, watch.slot, watch.source);
    ctx->save_for_backward({inputs, weight, a, b});
    ctx->saved_data["scaling"] = scaling;
    if (out.capture != nullptr) {
      ctx->saved_data["capture"] =
          c10::IValue::make_capsule(c10::make_intrusive<CaptureHolder>(out.capture));
    }
    return out.output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& weight = saved[1];
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const auto capture = ctx->saved_data.find("capture");
    if (capture != ctx->saved_data.end()) {
      static_cast<CaptureHolder*>(capture->second.toCapsule().get())
          ->capture->complete(grads[0], saved[0]);
    }
    const detail::LoraGradients found = detail::lora_backward(
        grads[0], saved[0], weight, saved[2], saved[3], scaling,
        {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)});
    variable_list out(7);
    out[0] = found.inputs;
    out[1] = found.a;
    out[2] = found.b;
    if (!weight.defined() && ctx->needs_input_grad(3)) {  // absent optionals have no edge
      out[4] = grads[0];
    }
    return out;
  }

  struct CaptureHolder : torch::CustomClassHolder {
    explicit CaptureHolder(std::shared_ptr<Capture> c) : capture(std::move(c)) {}
    std::shared_ptr<Capture> capture;
  };
};

std::optional<at::Tensor> given(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

void check_shapes(const char* where,
                  const at::Tensor& inputs,
                  const at::Tensor& a,
                  const at::Tensor& b,
                  int64_t in_features,
                  int64_t out_features) {
  CTRLORA_CHECK(inputs.dim() >= 1 && a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(1) &&
                    inputs.size(-1) == in_features && a.size(1) == in_features &&
                    b.size(0) == out_features,
                where, "expected inputs (..., n), a (r, n), b (m, r) with n = ", in_features,
                ", m = ", out_features, "; got inputs ", inputs.sizes(), ", a ", a.sizes(), ", b ",
                b.sizes(), ".");
}

}  // namespace

at::Tensor lora_linear(const at::Tensor& inputs,
                       const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias,
                       const at::Tensor& a,
                       const at::Tensor& b,
                       double scaling,
                       const std::shared_ptr<ObservationSlot>& slot,
                       bool transposed) {
  const at::Tensor frozen = transposed ? weight.detach().t() : weight.detach();
  CTRLORA_CHECK(weight.dim() == 2, "ctrlora::lora_linear", "expected a 2-d weight; got ",
                weight.sizes(), ".");
  check_shapes("ctrlora::lora_linear", inputs, a, b, frozen.size(1), frozen.size(0));
  // pybind hands None over as an undefined tensor.
  const bool has_bias = bias.has_value() && bias->defined();
  const at::Tensor frozen_bias = has_bias ? bias->detach() : at::Tensor();
  const at::DeviceType device = inputs.device().type();
  if (at::autocast::is_autocast_enabled(device)) {
    const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
    const at::Tensor cast_bias =
        frozen_bias.defined() ? at::autocast::cached_cast(dtype, frozen_bias, device) : frozen_bias;
    const at::Tensor cast_inputs = at::autocast::cached_cast(dtype, inputs, device);
    const at::Tensor cast_weight = at::autocast::cached_cast(dtype, frozen, device);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return LoraFunction::apply(cast_inputs, a, b, given(cast_weight), given(cast_bias), scaling,
                               watch(slot, inputs));
  }
  return LoraFunction::apply(inputs, a, b, given(frozen), given(frozen_bias), scaling,
                             watch(slot, inputs));
}

at::Tensor lora_delta(const at::Tensor& inputs,
                      const at::Tensor& base_output,
                      const at::Tensor& a,
                      const at::Tensor& b,
                      double scaling,
                      const std::shared_ptr<ObservationSlot>& slot) {
  check_shapes("ctrlora::lora_delta", inputs, a, b, inputs.size(-1), base_output.size(-1));
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return LoraFunction::apply(inputs.to(base_output.scalar_type()), a, b, given({}),
                             given(base_output), scaling, watch(slot, inputs));
}

}  // namespace ctrlora
