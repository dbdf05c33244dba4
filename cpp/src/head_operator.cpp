// A head's outputs as an operator of torch's dispatcher, for compilers:
// torch.ops.ctrlora.watch_head hands them on, and its backward, when the compiled code runs, shows
// them to the head's slot together with their gradient. Nothing has to be kept from the forward but
// the outputs. Eager code takes a hook (watch_head), which copies nothing.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <utility>

#include "ctrlora/head.h"

namespace ctrlora {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// An operator's result must be memory of its own.
at::Tensor forward_kernel(const at::Tensor& outputs,
                          const at::Tensor& /*inputs*/,
                          int64_t /*slot*/) {
  return outputs.clone();
}

at::Tensor backward_kernel(const at::Tensor& grad,
                           const at::Tensor& outputs,
                           const at::Tensor& inputs,
                           int64_t slot) {
  if (const std::shared_ptr<HeadSlot> head = HeadSlot::find(slot)) {
    if (const std::shared_ptr<HeadCapture> capture = head->capture(inputs, outputs)) {
      capture->complete(grad);
    }
  }
  return grad.clone();
}

// ---- Shapes alone; slots come by value, as the schema has them ----

at::Tensor forward_meta(const at::Tensor& outputs,
                        const at::Tensor& /*inputs*/,
                        c10::SymInt /*slot*/) {  // NOLINT(performance-unnecessary-value-param)
  return at::empty_like(outputs);
}

at::Tensor backward_meta(const at::Tensor& grad,
                         const at::Tensor& /*outputs*/,
                         const at::Tensor& /*inputs*/,
                         c10::SymInt /*slot*/) {  // NOLINT(performance-unnecessary-value-param)
  return at::empty_like(grad);
}

// ---- Calls through the dispatcher, which a tracer records ----

at::Tensor call_forward(const at::Tensor& outputs, const at::Tensor& inputs, c10::SymInt slot) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("ctrlora::watch_head", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymInt)>();
  return op.call(outputs, inputs, std::move(slot));
}

at::Tensor call_backward(const at::Tensor& grad,
                         const at::Tensor& outputs,
                         const at::Tensor& inputs,
                         c10::SymInt slot) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctrlora::watch_head_backward", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&,
                                               const at::Tensor&, c10::SymInt)>();
  return op.call(grad, outputs, inputs, std::move(slot));
}

struct WatchHeadFunction : torch::autograd::Function<WatchHeadFunction> {
  static at::Tensor forward(AutogradContext* ctx,
                            const at::Tensor& outputs,
                            const at::Tensor& inputs,
                            c10::SymInt slot) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({outputs, inputs});
    ctx->saved_data["slot"] = slot;
    return call_forward(outputs, inputs, std::move(slot));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (at::GradMode::is_enabled()) {  // this backward is differentiated: nothing is observed
      return {grads[0], at::Tensor(), at::Tensor()};
    }
    const variable_list saved = ctx->get_saved_variables();
    return {call_backward(grads[0], saved[0], saved[1], ctx->saved_data["slot"].toSymInt()),
            at::Tensor(), at::Tensor()};
  }
};

at::Tensor forward_autograd(const at::Tensor& outputs, const at::Tensor& inputs, c10::SymInt slot) {
  return WatchHeadFunction::apply(outputs, inputs.detach(), std::move(slot));
}

TORCH_LIBRARY_FRAGMENT(ctrlora, m) {
  m.def("watch_head(Tensor outputs, Tensor inputs, SymInt slot) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("watch_head_backward(Tensor grad, Tensor outputs, Tensor inputs, SymInt slot) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctrlora, CompositeExplicitAutograd, m) {
  m.impl("watch_head", &forward_kernel);
  m.impl("watch_head_backward", &backward_kernel);
}

TORCH_LIBRARY_IMPL(ctrlora, Meta, m) {
  m.impl("watch_head", &forward_meta);
  m.impl("watch_head_backward", &backward_meta);
}

TORCH_LIBRARY_IMPL(ctrlora, Autograd, m) {
  m.impl("watch_head", &forward_autograd);
}

}  // namespace

}  // namespace ctrlora
