// Engine::step alone over the number of pairs of one shape: time per pair must fall, since a group
// is stepped as one batch. bench/python/bench_step.py compares the same step with AdamW's.
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>

#include <string>
#include <vector>

#include "ctrlora/engine.h"

namespace {

constexpr int64_t kRank = 16;

std::vector<ctrlora::LoraPair> make_pairs(int64_t count, int64_t width) {
  std::vector<ctrlora::LoraPair> pairs;
  for (int64_t i = 0; i < count; ++i) {
    ctrlora::LoraPair pair;
    pair.a = at::randn({kRank, width}).requires_grad_();
    pair.b = at::randn({width, kRank}).requires_grad_();
    pair.name = "layer" + std::to_string(i);
    pair.a.mutable_grad() = at::randn({kRank, width});
    pair.b.mutable_grad() = at::randn({width, kRank});
    pairs.push_back(pair);
  }
  return pairs;
}

void engine_step(benchmark::State& state) {
  const std::vector<ctrlora::LoraPair> pairs = make_pairs(state.range(0), state.range(1));
  ctrlora::Engine engine{ctrlora::Options{}};
  engine.add_pairs(pairs, /*group=*/0);
  // lr tiny: the parameters hardly move, so every iteration is the same work.
  const std::vector<ctrlora::GroupSettings> settings{{.lr = 1e-6, .initial_lr = 1e-6}};
  engine.step(settings);  // the first step balances the gauge and fills caches
  for (auto _ : state) {
    engine.step(settings);
  }
  state.counters["pairs_per_second"] = benchmark::Counter(
      static_cast<double>(state.range(0)), benchmark::Counter::kIsIterationInvariantRate);
}

BENCHMARK(engine_step)
    ->ArgNames({"pairs", "width"})
    ->Args({1, 512})
    ->Args({8, 512})
    ->Args({32, 512})
    ->Args({8, 2048})
    ->Args({56, 64})  // little but the rank-space algebra of a 7B model's 56 pairs
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

}  // namespace
