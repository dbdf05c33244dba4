// Settings of the engine: plain numbers, each with unit, range, default and the reason for the
// default.
//
// [M] marks defaults measured on language-model fine-tuning; cpp/README.md holds the equations.
#pragma once

#include <cstdint>
#include <string>

#include "ctrlora/export.h"

namespace ctrlora {

/// What the loss averages over: special values of Options::loss_terms.
inline constexpr int64_t kLossTermsTokens = 0;
inline constexpr int64_t kLossTermsSequences = -1;

/// Settings shared by all layers of one Engine. Learning rates and weight decay belong to parameter
/// groups and come with every step (GroupSettings).
struct CTRLORA_API Options {
  // ---- Curvature (cpp/README.md, section 2) ----

  /// What the metric is made of. "kfac": observed factors; "gradient": factors from the adapters'
  /// gradients alone, nothing is observed; "hutchinson": the direction is that of whitening 0, and
  /// the Fisher ball is measured by c I with c from the traces of hutchinson_every.
  std::string curvature = "kfac";

  /// Steps between two probes of the Hessian's traces through the closure, >= 0; 0: none. A probe
  /// costs two evaluations of the closure.
  int64_t hutchinson_every = 0;

  /// Eigenpairs kept per Kronecker factor, k >= 1; capped at the factor's size. 16 ends 0.003
  /// nats above 32 and 0.02 below 8 [M]; at k = r the state is as large as AdamW's.
  int64_t sketch_rank = 16;

  /// "float32" (of float64 parameters: float64) or "bfloat16": how the factors' bases are kept;
  /// they are computed with in float32. bfloat16 halves what the state takes beyond the momentum.
  std::string basis_dtype = "float32";

  /// Rows (tokens) of one backward that enter a factor, >= 1. 256 is indistinguishable from all
  /// [M].
  int64_t sample_rows = 256;

  /// Steps between two observations of a layer, >= 1. 1 ends 0.01 nats below 2, 0.03 below 3: the
  /// metric knows the batch whose gradient it meets. Its cost: bench_step.py, "ctr", "thirds" [M].
  int64_t factor_every = 1;

  /// The same under several processes, where what is observed is also sent, >= 0. 0: as often as
  /// keeps that at 1/24 of the gradients' bytes, 4.2 %; 12 to 14 for float32 adapters with k = r.
  int64_t exchange_every = 0;

  /// First steps on which every layer is observed, >= 0: the factors start from nothing.
  int64_t factor_warmup_steps = 5;

  /// EMA weight of the old factor, in [0, 1); a plain mean until 1/(1 - factor_beta) batches were
  /// seen. 0.6 forgets within some 3 steps, as LoRA moves the layers fast, where Martens & Grosse
  /// (2015), section 5, take 0.95 [M].
  double factor_beta = 0.6;

  /// lambda as a share of the factor's mean eigenvalue tr F / d, > 0. A factor of three either way
  /// changes nothing [M].
  double damping = 0.01;

  /// Exponent gamma of the metric, in [0, 1]. 1: natural gradient; 0: no curvature, which
  /// ends 0.3 nats higher; from 0.55 to 0.65 nothing changes [M].
  double whitening = 0.55;

  /// Largest dimension for which a complete basis (k = d, a d x d object) is allowed, >= 1.
  int64_t dense_limit = 256;

  /// What the loss averages: kLossTermsTokens (rows with a gradient), kLossTermsSequences, or that
  /// many terms. Scales the output factor of all layers alike: matters for the Fisher ball only.
  int64_t loss_terms = kLossTermsTokens;

  /// "mean" or "sum": whether output gradients carry 1/terms.
  std::string loss_reduction = "mean";

  /// Factor on the loss while gradients are observed (GradScaler's scale), > 0. Gradients in .grad
  /// are taken as they are found.
  double loss_scale = 1.0;

  // ---- Direction (section 3) ----

  /// Momentum weight, in [0, 1). 0.6 ends 0.02 nats below 0.8 [M].
  double beta1 = 0.6;

  /// Relative floor of the rank-space Gram P, in the gauge where Q = I; > 0.
  double gram_floor = 1e-4;

  /// Whether to ascend instead of descend.
  bool maximize = false;

  /// Whether steps on pairs of 16 bits are made on float32 copies, which are rounded into them.
  /// Off: PEFT keeps adapters in float32 beside a 16-bit base. A step that is less than half of a
  /// parameter's last bit is lost without.
  bool master_weights = false;

  // ---- Length (section 4) ----

  /// Radius of the global Fisher ball in nats per loss term at the initial learning rate, > 0; inf
  /// switches it off. Summed over layers as if they were independent, which a step's are not: the
  /// true KL is another number, at good learning rates a larger one (cpp/README.md, section 12). At
  /// a good learning rate the ball hardly matters [M]; it bounds a too large one.
  double kl_radius = 0.005;

  /// Largest change, to first order, of the outputs of a head that is trained along (head.h) in one
  /// step at the initial learning rate, as a share of their spread, > 0; inf switches it off. A
  /// fresh head knows nothing, and no other ball feels what the layers then do together: SST-2
  /// trains at learning rates from 0.0025 to 0.01 without it, to 0.1 with it. 0.5 is no better
  /// there, and 1 does not hold CoLA [M].
  double head_radius = 0.3;

  /// Change of such a head's outputs by a step of its weight, as a multiple of the fallback
  /// learning rate, rms over rows and outputs, where gradients agree; >= 0. 0: AdamW's own, which
  /// grows with the head's width. 100: 0.1 a step at 1e-3; SST-2 ends 0.004 higher with 50, alike
  /// with 200 [M].
  double head_step = 100.0;

  /// EMA weight of the raw direction's squared length, measured every third step, in [0, 1). 0.7
  /// forgets within some ten steps; hardly matters [M].
  double rms_beta = 0.7;

  /// "rms": length relative to the raw direction's RMS, shrinks where gradients are noise [M];
  /// "radius": every step fills the ball; "newton": to the minimum of the K-FAC model along the
  /// direction, at most as far as "radius". Natural with whitening 1; needs a mean loss.
  std::string step_length = "rms";

  /// Decay by curvature, >= 0: parameters also move by -lr curvature_decay times the gradient of
  /// 1/2 s^2 tr(PQ) a step, decoupled as weight decay is. 0: off.
  double curvature_decay = 0.0;

  /// Steps between two that the ratio of actual to predicted decrease is taken of, >= 0; 0: never.
  /// Such a step costs a second evaluation of the loss and a copy of parameters and state.
  int64_t ratio_every = 0;

  // ---- Overlap (section 7) ----

  /// Where factors are refreshed: "inline", "thread", "stream" or "auto" (see SideStream).
  std::string overlap = "auto";

  /// Steps that a refresh beside training may lag, 0 or 1. 1: it is entered on the next step, and a
  /// second copy of the factors is kept; 0: waited for at once, bit for bit as "inline". During
  /// warm-up, and with factor_every = 1, refreshes never lag.
  int64_t max_staleness = 1;

  // ---- Upkeep ----

  /// Steps between two balancings of the gauge (section 5), >= 1.
  int64_t balance_every = 100;

  /// Failures of one layer in a row after which AdamW takes it over (section 6), >= 1.
  int64_t max_misses = 5;

  /// AdamW's learning rate for such a layer, >= 0. 1e-3: AdamW's default.
  double fallback_lr = 1e-3;

  /// Seed of the row sampler and of the first bases.
  uint64_t seed = 0;

  /// Checks every range.
  /// @throws c10::ValueError (ValueError in Python) naming the option, its value and the rule.
  void validate() const;
};

/// Settings of one parameter group at one step.
struct CTRLORA_API GroupSettings {
  double lr = 0.1;            ///< pairs: largest relative change of a layer's output; else AdamW's.
  double initial_lr = 0.1;    ///< scales kl_radius by (lr / initial_lr)^2.
  double weight_decay = 0.0;  ///< decoupled: parameters shrink by lr * weight_decay a step.
  double beta1 = 0.9;         ///< fallback AdamW only.
  double beta2 = 0.999;       ///< fallback AdamW only.
  double eps = 1e-8;          ///< fallback AdamW only.
  double radius_factor = 1.0;  ///< of both balls' radii, > 0; the ratio test multiplies it.

  /// @throws c10::ValueError naming the setting, its value and the rule.
  void validate() const;
};

}  // namespace ctrlora
