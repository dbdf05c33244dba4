// Engine: failures of layers, saving and loading.
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ctrlora/engine.h"
#include "ctrlora/version.h"
#include "engine_model.h"

namespace {

using ctrlora::Engine;
using ctrlora::GroupSettings;
using ctrlora::LoraPair;
using ctrlora::Options;
using problems::adamw;
using problems::contains;
using problems::copy_of;
using problems::error;
using problems::error_of;
using problems::Model;
using problems::randn;
using problems::same;
using problems::same_bits;
using problems::State;
using problems::Warnings;

}  // namespace

TEST_CASE(
    "a layer whose Gram has no Cholesky factor sits out; after max_misses AdamW takes it over") {
  at::manual_seed(3);
  Options options;
  options.sketch_rank = 2;
  options.factor_warmup_steps = 1;
  options.factor_every = 100;
  options.balance_every = 6;
  options.max_misses = 3;
  Model own(3, options);
  const GroupSettings settings{.lr = 0.05, .initial_lr = 0.1, .weight_decay = 0.1};
  const auto step = [&] {
    own.random_gradients();
    own.engine.step({settings});
  };
  for (int clean = 0; clean < 3; ++clean) {  // the next three measure no Grams of layer 1 anew
    step();
  }
  const std::vector<at::Tensor> before = own.parameters();
  Warnings warnings;
  for (int64_t miss = 1; miss <= 3; ++miss) {
    CHECK(own.engine.retired().empty());
    State indefinite = copy_of(own.engine);
    indefinite.at("group0.output.ww").select(0, 1).copy_(-5 * at::eye(2, at::kDouble));  // so is P
    own.engine.load(indefinite);
    step();
    CHECK(same_bits(own.state("group0.misses"),
                    at::tensor({int64_t{0}, miss, int64_t{0}}, at::kLong)));
    if (miss < 3) {
      CHECK(same_bits(own.pairs[1].a.detach(), before[2]));
      CHECK(error(own.pairs[0].a.detach(), before[0]) > 1e-4);
    }
  }
  CHECK(own.engine.retired() == std::vector<std::string>{"layer 1"});
  CHECK(warnings.text ==
        "[ctrlora::Engine] layer 'layer 1' failed 3 times in a row; AdamW trains it from now on.");
  at::Tensor b = own.pairs[1].b.detach().clone(), m = at::zeros_like(b), v = at::zeros_like(b);
  for (int t = 1; t <= 4; ++t) {  // from the next step on, at fallback_lr on the pairs' schedule
    step();
    adamw(b, m, v, own.pairs[1].b.grad(), t, {.lr = 1e-3 * 0.5, .weight_decay = 0.1});
    CHECK(error(own.pairs[1].b.detach(), b) < 1e-13);
  }
  CHECK(own.engine.metrics().at("retired") == 1.0);

  Model fresh(3, options);  // a new process resumes the run
  fresh.engine.load(copy_of(own.engine));
  CHECK(fresh.engine.retired() == std::vector<std::string>{"layer 1"});
  CHECK(same(copy_of(fresh.engine), copy_of(own.engine)));
}

TEST_CASE("a run that was saved and loaded goes on bit for bit") {
  Options options;
  options.sketch_rank = 3;
  options.sample_rows = 8;  // the sampler's draws must resume too
  options.balance_every = 3;
  options.factor_every = 3;
  for (const int64_t saved_at : {0, 1, 5, 8, 9}) {
    options.overlap = saved_at >= 8 ? "thread" : "inline";  // saved with a refresh under way
    at::manual_seed(4);
    Model first(4, options), second(4, options);
    const at::Tensor head = randn({3}).requires_grad_(), twin = randn({3}).requires_grad_();
    first.engine.add_fallback({head}, 0);
    second.engine.add_fallback({twin}, 0);
    const auto run = [](Model& own, const at::Tensor& own_head, int steps, uint64_t seed) {
      at::manual_seed(seed);
      for (int step = 0; step < steps; ++step) {
        own.backward();
        own_head.mutable_grad() = randn({3});
        own.engine.step({GroupSettings{}});
      }
    };
    run(first, head, static_cast<int>(saved_at), 5);
    run(second, twin, 2, 6);  // had a life of its own
    const std::vector<at::Tensor> saved = first.parameters();
    for (size_t l = 0; l < 4; ++l) {
      second.pairs[l].a.detach().copy_(saved[2 * l]);
      second.pairs[l].b.detach().copy_(saved[2 * l + 1]);
    }
    twin.detach().copy_(head.detach());
    second.engine.load(copy_of(first.engine));
    CHECK(second.engine.steps() == saved_at);
    run(first, head, 7, 7);
    run(second, twin, 7, 7);
    for (size_t i = 0; i < saved.size(); ++i) {
      CHECK(same_bits(first.parameters()[i], second.parameters()[i]));
    }
    CHECK(same_bits(head.detach(), twin.detach()));
    CHECK(same(copy_of(first.engine), copy_of(second.engine)));
  }
}

TEST_CASE(
    "refreshes beside training: without staleness as inline; with one step, the same on a repeat") {
  const auto run = [](const std::string& overlap, int64_t max_staleness) {
    Options options;
    options.sketch_rank = 3;
    options.overlap = overlap;
    options.max_staleness = max_staleness;
    options.factor_every = 3;
    options.factor_warmup_steps = 2;
    at::manual_seed(7);
    Model own(5, options);
    for (int step = 0; step < 12; ++step) {
      own.backward();
      own.engine.step({GroupSettings{}});
    }
    return own.parameters();
  };
  const std::vector<at::Tensor> here = run("inline", 1), waiting = run("thread", 0);
  const std::vector<at::Tensor> late = run("thread", 1), again = run("thread", 1);
  for (size_t i = 0; i < here.size(); ++i) {
    CHECK(same_bits(here[i], waiting[i]));
    CHECK(same_bits(late[i], again[i]));
    CHECK_FALSE(same_bits(here[i], late[i]));  // it did lag
    CHECK(error(here[i], late[i]) < 0.1);
  }
}

TEST_CASE("a state of other layers is refused with every difference, before any change") {
  at::manual_seed(5);
  Model own(2);
  own.backward();
  own.engine.step({GroupSettings{}});
  const State good = copy_of(own.engine);
  const auto message = [&](const State& state) {
    const std::string text = error_of([&] { own.engine.load(state); });
    CHECK(same(copy_of(own.engine), good));
    CHECK(own.engine.retired().empty());
    return text;
  };
  State bad = good;
  bad.erase("group0.rms_weight");
  bad["group7.seen"] = at::zeros({1});
  bad["group0.momentum_a"] = at::zeros({3, 2, 6});
  bad["group0.active"] = at::zeros({2}, at::kBool);
  const std::string text = message(bad);
  CHECK(contains(
      text, "[ctrlora::Engine::load] the state is damaged, or belongs to another set of layers"));
  CHECK(contains(text, "\n  missing group0.rms_weight"));
  CHECK(contains(text, "\n  unexpected group7.seen"));
  CHECK(contains(text, "\n  group0.momentum_a: expected [2, 2, 6]; got [3, 2, 6]"));
  bad = good;
  bad["version"] = at::full({1}, ctrlora::kStateVersion + 1, at::kLong);
  CHECK(
      contains(message(bad), c10::str("expected state of format version ", ctrlora::kStateVersion,
                                      "; got ", ctrlora::kStateVersion + 1, ". Remedy: load it")));
  CHECK(contains(message({}), "; got none."));
  bad = good;
  bad["version"] = at::empty({1}, at::TensorOptions(at::kLong).device(at::kMeta));
  CHECK(contains(message(bad), "; got none."));
  bad = good;
  bad["group0.active"] = at::zeros({2}, at::kBool);  // their AdamW's state is not there
  CHECK(contains(message(bad), "\n  missing retired.layer 0.0.exp_avg"));
  bad = good;
  bad["group0.share_set"] = at::full({2}, 2, at::kLong);
  bad["group0.age"] = at::full({1}, std::numeric_limits<int64_t>::max(), at::kLong);
  bad["group0.seen"] = at::full({2}, -1.0, at::kDouble);
  bad["group0.input.trace"] = at::full({2}, 1, at::kLong);
  const std::string values = message(bad);
  CHECK(contains(values, "\n  group0.share_set: expected whole numbers from -1 to 1; got others"));
  CHECK(contains(values, "\n  group0.age: expected whole numbers from -1 to 9007199254740992"));
  CHECK(contains(values, "\n  group0.seen: expected no negative numbers; got some"));
  CHECK(contains(values, "\n  group0.input.trace: expected Double; got Long (Strided)"));
  bad = good;
  bad["group0.input.basis"] = 1.1 * at::ones_like(good.at("group0.input.basis"));
  CHECK(contains(message(bad), "\n  group0.input.basis: expected columns of norm 1 or 0"));
  bad = good;
  bad["group0.output.trace"] = at::full({2}, 1e-300, at::kDouble);
  CHECK(contains(message(bad),
                 "\n  group0.output.eigenvalues: expected eigenvalues that add up to the trace"));
  bad = good;
  bad["radius"] = good.at("radius") * 1e175;  // steps are multiplied by the first number
  CHECK(contains(message(bad), "\n  radius: expected a factor in [0.015625, 4]; got 1e+175"));
}

TEST_CASE("a state saved before a layer was ever observed resumes with a fresh basis") {
  for (const bool wide : {false, true}) {  // which of the two bases is complete
    at::manual_seed(6);
    const int64_t m = wide ? 9 : 3, n = wide ? 3 : 9;
    Options options;
    options.sketch_rank = 4;
    const auto layer = [&](Engine& engine, const LoraPair& pair) {
      engine.add_pairs({pair}, 0);
      return ctrlora::find_slot(pair.a);
    };
    const LoraPair first = problems::make_pair(m, n, 2), second = problems::make_pair(m, n, 2);
    ctrlora::register_pair(first);
    ctrlora::register_pair(second);
    Engine saved(options), resumed(options);
    layer(saved, first);
    const auto slot = layer(resumed, second);
    resumed.load(copy_of(saved));
    slot->capture(randn({20, n}), randn({20, m}))->complete(randn({20, m}));
    second.a.mutable_grad() = randn({2, n});
    second.b.mutable_grad() = randn({m, 2});
    const at::Tensor before = second.b.detach().clone();
    resumed.step({GroupSettings{}});
    CHECK(resumed.metrics().at("misses") == 0.0);
    CHECK(resumed.metrics().at("captured_input") > 0.1);
    CHECK(resumed.metrics().at("captured_output") > 0.1);
    CHECK_FALSE(same_bits(second.b.detach(), before));
  }
}

TEST_CASE("a rank above the inputs' size has no tangent step: AdamW trains that pair") {
  at::manual_seed(12);
  Warnings warnings;
  Engine engine{Options{}};
  const LoraPair pair = problems::make_pair(6, 3, 4);
  engine.add_pairs({pair}, 0);
  CHECK(warnings.text ==
        "[ctrlora::Engine] layer 'layer' has rank 4 but only 3 inputs; AdamW trains it.");
  CHECK(engine.retired() == std::vector<std::string>{"layer"});
  at::Tensor b = pair.b.detach().clone(), m = at::zeros_like(b), v = at::zeros_like(b);
  pair.a.mutable_grad() = randn({4, 3});
  pair.b.mutable_grad() = randn({6, 4});
  engine.step({GroupSettings{}});
  adamw(b, m, v, pair.b.grad(), 1, {.lr = 1e-3});
  CHECK(error(pair.b.detach(), b) < 1e-13);
}
