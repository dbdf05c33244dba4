#include "ctrlora/options.h"

#include <cmath>

#include "detail/check.h"

namespace ctrlora {

// The value and the rule in one message: "[ctrlora::Options] damping = 0. Violated constraint:
// damping > 0."
#define CTRLORA_RULE(where, name, rule) \
  CTRLORA_CHECK(rule, where, #name " = ", name, ". Violated constraint: " #rule ".")

void Options::validate() const {
  constexpr const char* kWhere = "ctrlora::Options";
  CTRLORA_RULE(kWhere, curvature,
               curvature == "kfac" || curvature == "gradient" || curvature == "hutchinson");
  CTRLORA_RULE(kWhere, hutchinson_every, hutchinson_every >= 0);
  CTRLORA_CHECK(curvature != "hutchinson" || hutchinson_every > 0, kWhere,
                ": expected hutchinson_every > 0 for curvature = hutchinson; got ",
                hutchinson_every, ". Remedy: hutchinson_every = 10, say.");
  CTRLORA_RULE(kWhere, sketch_rank, sketch_rank >= 1);
  CTRLORA_RULE(kWhere, basis_dtype, basis_dtype == "float32" || basis_dtype == "bfloat16");
  CTRLORA_RULE(kWhere, sample_rows, sample_rows >= 1);
  CTRLORA_RULE(kWhere, factor_every, factor_every >= 1);
  CTRLORA_RULE(kWhere, exchange_every, exchange_every >= 0);
  CTRLORA_RULE(kWhere, factor_warmup_steps, factor_warmup_steps >= 0);
  CTRLORA_RULE(kWhere, factor_beta, factor_beta >= 0.0 && factor_beta < 1.0);
  CTRLORA_RULE(kWhere, damping, damping > 0.0 && std::isfinite(damping));
  CTRLORA_RULE(kWhere, whitening, whitening >= 0.0 && whitening <= 1.0);
  CTRLORA_RULE(kWhere, dense_limit, dense_limit >= 1);
  CTRLORA_RULE(kWhere, loss_terms, loss_terms >= kLossTermsSequences);
  CTRLORA_RULE(kWhere, loss_reduction, loss_reduction == "mean" || loss_reduction == "sum");
  CTRLORA_RULE(kWhere, loss_scale, loss_scale > 0.0 && std::isfinite(loss_scale));
  CTRLORA_RULE(kWhere, beta1, beta1 >= 0.0 && beta1 < 1.0);
  CTRLORA_RULE(kWhere, gram_floor, gram_floor > 0.0 && gram_floor < 1.0);
  CTRLORA_RULE(kWhere, kl_radius, kl_radius > 0.0);
  CTRLORA_RULE(kWhere, head_radius, head_radius > 0.0);
  CTRLORA_RULE(kWhere, rms_beta, rms_beta >= 0.0 && rms_beta < 1.0);
  CTRLORA_RULE(kWhere, step_length,
               step_length == "rms" || step_length == "radius" || step_length == "newton");
  CTRLORA_CHECK(step_length != "newton" || loss_reduction == "mean", kWhere,
                ": expected a mean loss for step_length = newton; got loss_reduction = ",
                loss_reduction, ". Remedy: average the loss, or step_length = rms.");
  CTRLORA_RULE(kWhere, curvature_decay, curvature_decay >= 0.0 && std::isfinite(curvature_decay));
  CTRLORA_RULE(kWhere, ratio_every, ratio_every >= 0);
  CTRLORA_RULE(
      kWhere, overlap,
      overlap == "inline" || overlap == "thread" || overlap == "stream" || overlap == "auto");
  CTRLORA_RULE(kWhere, max_staleness, max_staleness == 0 || max_staleness == 1);
  CTRLORA_RULE(kWhere, balance_every, balance_every >= 1);
  CTRLORA_RULE(kWhere, max_misses, max_misses >= 1);
  CTRLORA_RULE(kWhere, head_step, head_step >= 0.0 && std::isfinite(head_step));
  CTRLORA_RULE(kWhere, fallback_lr, fallback_lr >= 0.0 && std::isfinite(fallback_lr));
}

void GroupSettings::validate() const {
  constexpr const char* kWhere = "ctrlora::GroupSettings";
  CTRLORA_RULE(kWhere, lr, lr >= 0.0 && std::isfinite(lr));
  CTRLORA_RULE(kWhere, initial_lr, initial_lr >= 0.0 && std::isfinite(initial_lr));
  CTRLORA_RULE(kWhere, radius_factor, radius_factor > 0.0 && std::isfinite(radius_factor));
  CTRLORA_RULE(kWhere, weight_decay, weight_decay >= 0.0 && std::isfinite(weight_decay));
  CTRLORA_RULE(kWhere, beta1, beta1 >= 0.0 && beta1 < 1.0);
  CTRLORA_RULE(kWhere, beta2, beta2 >= 0.0 && beta2 < 1.0);
  CTRLORA_RULE(kWhere, eps, eps >= 0.0 && std::isfinite(eps));
}

#undef CTRLORA_RULE

}  // namespace ctrlora
