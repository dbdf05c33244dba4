#include "ctrlora/options.h"

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "ctrlora/engine.h"
#include "problems.h"

namespace {

using ctrlora::GroupSettings;
using ctrlora::Options;
using problems::error_of;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

template <typename Settings>
std::string message_with(const std::function<void(Settings&)>& change) {
  Settings settings;
  change(settings);
  return error_of([&] { settings.validate(); });
}

/// Every value in `bad` is refused with the option's name, the value and the rule; every one in
/// `good` passes.
template <typename Settings, typename Value>
void check_range(Value Settings::* member,
                 const std::string& where,
                 const std::string& name,
                 const std::string& rule,
                 const std::vector<Value>& bad,
                 const std::vector<Value>& good) {
  for (const Value& value : bad) {
    const std::string expected =
        c10::str("[", where, "] ", name, " = ", value, ". Violated constraint: ", rule, ".");
    CHECK(message_with<Settings>([&](Settings& own) { own.*member = value; }) == expected);
  }
  for (const Value& value : good) {
    CAPTURE(name);
    CHECK(message_with<Settings>([&](Settings& own) { own.*member = value; }).empty());
  }
}

void check_option(int64_t Options::* member,
                  const std::string& name,
                  int64_t smallest,
                  const std::string& rule) {
  check_range<Options, int64_t>(member, "ctrlora::Options", name, rule, {smallest - 1, -1000},
                                {smallest, 1000000});
}

void check_option(double Options::* member,
                  const std::string& name,
                  const std::string& rule,
                  const std::vector<double>& bad,
                  const std::vector<double>& good) {
  check_range<Options, double>(member, "ctrlora::Options", name, rule, bad, good);
}

void check_setting(double GroupSettings::* member,
                   const std::string& name,
                   const std::string& rule,
                   const std::vector<double>& bad,
                   const std::vector<double>& good) {
  check_range<GroupSettings, double>(member, "ctrlora::GroupSettings", name, rule, bad, good);
}

}  // namespace

TEST_CASE("the defaults are those of the documentation and are valid") {
  const Options options;
  CHECK(error_of([&] { options.validate(); }).empty());
  CHECK(options.sketch_rank == 16);
  CHECK(options.sample_rows == 256);
  CHECK(options.factor_every == 1);
  CHECK(options.exchange_every == 0);
  CHECK(options.factor_warmup_steps == 5);
  CHECK(options.factor_beta == 0.6);
  CHECK(options.damping == 0.01);
  CHECK(options.whitening == 0.55);
  CHECK(options.dense_limit == 256);
  CHECK(options.loss_terms == ctrlora::kLossTermsTokens);
  CHECK(options.loss_reduction == "mean");
  CHECK(options.loss_scale == 1.0);
  CHECK(options.beta1 == 0.6);
  CHECK(options.gram_floor == 1e-4);
  CHECK_FALSE(options.maximize);
  CHECK_FALSE(options.master_weights);
  CHECK(options.kl_radius == 0.005);
  CHECK(options.rms_beta == 0.7);
  CHECK(options.step_length == "rms");
  CHECK(options.curvature_decay == 0.0);
  CHECK(options.ratio_every == 0);
  CHECK(options.curvature == "kfac");
  CHECK(options.hutchinson_every == 0);
  CHECK(options.overlap == "auto");
  CHECK(options.max_staleness == 1);
  CHECK(options.balance_every == 100);
  CHECK(options.max_misses == 5);
  CHECK(options.fallback_lr == 1e-3);
  CHECK(options.seed == 0);
  CHECK(error_of([] { GroupSettings{}.validate(); }).empty());
}

TEST_CASE("whole-number options name themselves, their value and their rule") {
  check_option(&Options::sketch_rank, "sketch_rank", 1, "sketch_rank >= 1");
  check_option(&Options::sample_rows, "sample_rows", 1, "sample_rows >= 1");
  check_option(&Options::factor_every, "factor_every", 1, "factor_every >= 1");
  check_option(&Options::exchange_every, "exchange_every", 0, "exchange_every >= 0");
  check_option(&Options::factor_warmup_steps, "factor_warmup_steps", 0, "factor_warmup_steps >= 0");
  check_option(&Options::dense_limit, "dense_limit", 1, "dense_limit >= 1");
  check_option(&Options::loss_terms, "loss_terms", ctrlora::kLossTermsSequences,
               "loss_terms >= kLossTermsSequences");
  check_option(&Options::balance_every, "balance_every", 1, "balance_every >= 1");
  check_option(&Options::ratio_every, "ratio_every", 0, "ratio_every >= 0");
  check_option(&Options::hutchinson_every, "hutchinson_every", 0, "hutchinson_every >= 0");
  check_option(&Options::max_misses, "max_misses", 1, "max_misses >= 1");
}

TEST_CASE("real options name themselves, their value and their rule") {
  check_option(&Options::factor_beta, "factor_beta", "factor_beta >= 0.0 && factor_beta < 1.0",
               {-0.1, 1.0, kNan}, {0.0, 0.999});
  check_option(&Options::damping, "damping", "damping > 0.0 && std::isfinite(damping)",
               {0.0, -1.0, kNan, kInf}, {1e-12, 10.0});
  check_option(&Options::whitening, "whitening", "whitening >= 0.0 && whitening <= 1.0",
               {-0.01, 1.01, kNan}, {0.0, 1.0});
  check_option(&Options::loss_scale, "loss_scale", "loss_scale > 0.0 && std::isfinite(loss_scale)",
               {0.0, -1.0, kNan, kInf}, {65536.0});
  check_option(&Options::beta1, "beta1", "beta1 >= 0.0 && beta1 < 1.0", {-0.1, 1.0, kNan},
               {0.0, 0.99});
  check_option(&Options::gram_floor, "gram_floor", "gram_floor > 0.0 && gram_floor < 1.0",
               {0.0, 1.0, kNan}, {1e-12, 0.5});
  check_option(&Options::kl_radius, "kl_radius", "kl_radius > 0.0", {0.0, -1.0, kNan},
               {1e-9, kInf});
  check_option(&Options::rms_beta, "rms_beta", "rms_beta >= 0.0 && rms_beta < 1.0",
               {-0.1, 1.0, kNan}, {0.0, 0.99});
  check_option(&Options::curvature_decay, "curvature_decay",
               "curvature_decay >= 0.0 && std::isfinite(curvature_decay)", {-1.0, kNan, kInf},
               {0.0, 3.0});
  check_option(&Options::fallback_lr, "fallback_lr",
               "fallback_lr >= 0.0 && std::isfinite(fallback_lr)", {-1.0, kNan, kInf}, {0.0, 1.0});
}

TEST_CASE("word options name themselves, their value and their rule") {
  check_range<Options, std::string>(&Options::loss_reduction, "ctrlora::Options", "loss_reduction",
                                    "loss_reduction == \"mean\" || loss_reduction == \"sum\"",
                                    {"none", "", "Mean"}, {"mean", "sum"});
  check_range<Options, std::string>(&Options::basis_dtype, "ctrlora::Options", "basis_dtype",
                                    "basis_dtype == \"float32\" || basis_dtype == \"bfloat16\"",
                                    {"float16", ""}, {"float32", "bfloat16"});
  check_range<Options, std::string>(
      &Options::step_length, "ctrlora::Options", "step_length",
      "step_length == \"rms\" || step_length == \"radius\" || step_length == "
      "\"newton\"",
      {"fixed", ""}, {"rms", "radius", "newton"});
  CHECK(problems::contains(message_with<Options>([](Options& own) {
                             own.step_length = "newton";
                             own.loss_reduction = "sum";
                           }),
                           "expected a mean loss"));
  check_range<Options, std::string>(&Options::overlap, "ctrlora::Options", "overlap",
                                    "overlap == \"inline\" || overlap == \"thread\" || overlap == "
                                    "\"stream\" || overlap == \"auto\"",
                                    {"later", ""}, {"inline", "thread", "stream", "auto"});
  check_range<Options, int64_t>(&Options::max_staleness, "ctrlora::Options", "max_staleness",
                                "max_staleness == 0 || max_staleness == 1", {-1, 2}, {0, 1});
}

TEST_CASE("group settings name themselves, their value and their rule") {
  check_setting(&GroupSettings::lr, "lr", "lr >= 0.0 && std::isfinite(lr)", {-0.1, kNan, kInf},
                {0.0, 5.0});
  check_setting(&GroupSettings::initial_lr, "initial_lr",
                "initial_lr >= 0.0 && std::isfinite(initial_lr)", {-0.1, kNan, kInf}, {0.0, 5.0});
  check_setting(&GroupSettings::radius_factor, "radius_factor",
                "radius_factor > 0.0 && std::isfinite(radius_factor)", {0.0, -1.0, kNan, kInf},
                {0.5, 4.0});
  check_setting(&GroupSettings::weight_decay, "weight_decay",
                "weight_decay >= 0.0 && std::isfinite(weight_decay)", {-0.1, kNan, kInf}, {0.0});
  check_setting(&GroupSettings::beta1, "beta1", "beta1 >= 0.0 && beta1 < 1.0", {-0.1, 1.0, kNan},
                {0.0, 0.99});
  check_setting(&GroupSettings::beta2, "beta2", "beta2 >= 0.0 && beta2 < 1.0", {-0.1, 1.0, kNan},
                {0.0, 0.99});
  check_setting(&GroupSettings::eps, "eps", "eps >= 0.0 && std::isfinite(eps)", {-1e-9, kNan, kInf},
                {0.0});
}

TEST_CASE("an engine refuses bad options before it takes anything over") {
  Options options;
  options.damping = 0.0;
  CHECK(problems::contains(error_of([&] { const ctrlora::Engine engine(options); }),
                           "[ctrlora::Options] damping = 0. Violated constraint: damping > 0.0"));
}

TEST_CASE("an engine refuses bad settings before it moves anything") {
  ctrlora::Engine engine{Options{}};
  const ctrlora::LoraPair pair = problems::make_pair(4, 5, 2);
  engine.add_pairs({pair}, 0);
  pair.a.mutable_grad() = at::ones_like(pair.a);
  pair.b.mutable_grad() = at::ones_like(pair.b);
  const at::Tensor before = pair.b.detach().clone();
  CHECK(error_of([&] { engine.step({GroupSettings{.lr = -1.0}}); }) ==
        "[ctrlora::GroupSettings] lr = -1. Violated constraint: lr >= 0.0 && std::isfinite(lr).");
  CHECK(problems::same_bits(pair.b, before));
  CHECK(engine.steps() == 0);
}
