#include "ctrlora/observation.h"

#include <ATen/core/PhiloxRNGEngine.h>

#include <cmath>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "ctrlora/lora_pair.h"
#include "problems.h"

namespace {

using ctrlora::Capture;
using ctrlora::Observation;
using ctrlora::ObservationSlot;
using ctrlora::RowSampler;
using problems::randn;
using problems::same_bits;

struct RecordingSink : ctrlora::ObservationSink {
  explicit RecordingSink(int64_t sample_rows) : rows(sample_rows, /*seed=*/7) {}
  RowSampler& sampler() override { return rows; }
  [[nodiscard]] int64_t micro_batch(int64_t) const override {
    return static_cast<int64_t>(seen.size());
  }
  void observe(int64_t layer, const Observation& observation) override {
    seen.emplace_back(layer, observation);
  }
  RowSampler rows;
  std::vector<std::pair<int64_t, Observation>> seen;
};

struct Channel {
  explicit Channel(int64_t sample_rows, int64_t layer = 3)
      : sink(std::make_shared<RecordingSink>(sample_rows)) {
    slot->connect(sink, layer);
  }
  std::shared_ptr<RecordingSink> sink;
  std::shared_ptr<ObservationSlot> slot = std::make_shared<ObservationSlot>();
};

std::vector<int64_t> picked(RowSampler& sampler, int64_t rows, int64_t micro_batch) {
  const at::Tensor index = sampler.sample(rows, micro_batch, at::kCPU);
  REQUIRE(index.defined());
  REQUIRE((index.scalar_type() == at::kLong));
  return {index.const_data_ptr<int64_t>(), index.const_data_ptr<int64_t>() + index.numel()};
}

}  // namespace

TEST_CASE("the sampler takes all rows when they are few") {
  RowSampler sampler(8, 0);
  CHECK_FALSE(sampler.sample(8, 0, at::kCPU).defined());
  CHECK_FALSE(sampler.sample(1, 0, at::kCPU).defined());
  CHECK(picked(sampler, 9, 0).size() == 8);
}

TEST_CASE("draws depend on seed, step and micro-batch alone") {
  RowSampler first(16, 5), second(16, 5), other_seed(16, 6);
  CHECK(picked(first, 1000, 0) == picked(second, 1000, 0));
  CHECK(picked(first, 1000, 0) != picked(first, 1000, 1));
  CHECK(picked(first, 1000, 0) != picked(other_seed, 1000, 0));
  const std::vector<int64_t> at_zero = picked(first, 1000, 0);
  first.set_step(12);
  CHECK(picked(first, 1000, 0) != at_zero);
  picked(second, 1000, 4);  // what was drawn between does not matter
  second.set_step(12);
  CHECK(picked(second, 1000, 0) == picked(first, 1000, 0));
  second.set_step(0);
  CHECK(picked(second, 1000, 0) == at_zero);
}

TEST_CASE("rows are floor((i + u_i) N / R) with u from Philox4x32-10") {
  constexpr int64_t kRows = 1003;
  constexpr int64_t kSample = 32;
  RowSampler sampler(kSample, 5);
  sampler.set_step(3);
  at::philox_engine engine(5, (uint64_t{3} << 20U) + 2, 0);
  std::vector<int64_t> expected;
  for (int64_t i = 0; i < kSample; ++i) {
    const double u = static_cast<double>(engine()) / 4294967296.0;
    expected.push_back(static_cast<int64_t>((static_cast<double>(i) + u) * kRows / kSample));
  }
  CHECK(picked(sampler, kRows, 2) == expected);
}

TEST_CASE("each stratum gives one row, and rows are in order") {
  RowSampler sampler(7, 1);
  for (const int64_t rows : {8, 13, 100, 12345}) {
    for (int64_t micro_batch = 0; micro_batch < 20; ++micro_batch) {
      const std::vector<int64_t> index = picked(sampler, rows, micro_batch);
      REQUIRE(index.size() == 7);
      for (size_t i = 0; i < index.size(); ++i) {
        const double stride = static_cast<double>(rows) / 7.0;
        CHECK(index[i] >= static_cast<int64_t>(std::floor(static_cast<double>(i) * stride)));
        CHECK(static_cast<double>(index[i]) < static_cast<double>(i + 1) * stride);
        CHECK(index[i] < rows);
      }
    }
  }
}

TEST_CASE("every row is drawn equally often") {
  constexpr int64_t kRows = 10;
  constexpr int64_t kSample = 4;
  constexpr int64_t kDraws = 10000;
  RowSampler sampler(kSample, 2);
  std::vector<double> hits(kRows, 0.0);
  for (int64_t draw = 0; draw < kDraws; ++draw) {
    sampler.set_step(draw);
    for (const int64_t row : picked(sampler, kRows, 0)) {
      hits[static_cast<size_t>(row)] += 1.0;
    }
  }
  // Expected share R / N; five standard deviations of a share of 10000 draws.
  for (const double count : hits) {
    CHECK(std::abs(count / kDraws - 0.4) < 5 * std::sqrt(0.4 * 0.6 / kDraws));
  }
}

TEST_CASE("few rows arrive whole, with their weight, sequences and base squares") {
  at::manual_seed(0);
  Channel channel(64);
  const at::Tensor x = randn({2, 5, 3}), y = randn({2, 5, 4}), g = randn({2, 5, 4});
  channel.slot->capture(x, y)->complete(g);
  REQUIRE(channel.sink->seen.size() == 1);
  const auto& [layer, seen] = channel.sink->seen.front();
  CHECK(layer == 3);
  CHECK(same_bits(seen.inputs, x.view({10, 3})));
  CHECK(same_bits(seen.output_grads, g.view({10, 4})));
  CHECK(problems::error(seen.base_square, (y * y).sum(-1).view({10})) < 1e-14);
  CHECK(seen.row_weight == 1.0);
  CHECK(seen.sequences == 2);
  CHECK(channel.slot->observations() == 1);
}

TEST_CASE("many rows are sampled alike from inputs, base output and gradient") {
  at::manual_seed(0);
  Channel channel(8);
  const at::Tensor x = randn({2, 20, 3}), y = randn({2, 20, 4}), g = randn({2, 20, 4});
  const at::Tensor before = g.clone();
  channel.slot->capture(x, y)->complete(g);
  const Observation& seen = channel.sink->seen.at(0).second;
  const at::Tensor index = RowSampler(8, 7).sample(40, 0, at::kCPU);
  CHECK(same_bits(seen.inputs, x.view({40, 3}).index_select(0, index)));
  CHECK(same_bits(seen.output_grads, g.view({40, 4}).index_select(0, index)));
  CHECK(problems::error(seen.base_square, y.view({40, 4}).index_select(0, index).square().sum(-1)) <
        1e-14);
  CHECK(seen.row_weight == 5.0);
  CHECK(seen.sequences == 2);
  CHECK(same_bits(g, before));

  channel.slot->capture(x, y)->complete(g);  // the second micro-batch draws anew
  const at::Tensor second = RowSampler(8, 7).sample(40, 1, at::kCPU);
  CHECK(same_bits(channel.sink->seen.at(1).second.inputs, x.view({40, 3}).index_select(0, second)));
}

TEST_CASE("sequences: leading dimensions of 3-d inputs and up, rows else") {
  Channel channel(64);
  const auto sequences = [&](at::IntArrayRef sizes) {
    std::vector<int64_t> out = sizes.vec();
    channel.slot->capture(at::ones(sizes), {})->complete(at::ones(sizes));
    return channel.sink->seen.back().second.sequences;
  };
  CHECK(sequences({6, 3}) == 6);
  CHECK(sequences({4, 6, 3}) == 4);
  CHECK(sequences({2, 4, 6, 3}) == 8);
  CHECK(sequences({3}) == 1);
}

TEST_CASE(
    "base squares of low-precision outputs are taken in float64; without a base there are none") {
  Channel channel(64);
  const at::Tensor y = at::full({2, 300}, 100.0, at::kHalf);  // the square overflows float16
  channel.slot->capture(at::ones({2, 3}, at::kHalf), y)->complete(at::ones({2, 300}, at::kHalf));
  const at::Tensor square = channel.sink->seen.at(0).second.base_square;
  CHECK((square.scalar_type() == at::kDouble));
  CHECK(problems::error(square, at::full({2}, 3e6, at::kDouble)) < 1e-12);
  channel.slot->capture(at::ones({2, 3}), {})->complete(at::ones({2, 4}));
  CHECK_FALSE(channel.sink->seen.at(1).second.base_square.defined());
  // A base output of other rows (a module that pools, say) counts as none.
  channel.slot->capture(at::ones({2, 3}), at::ones({5, 4}))->complete(at::ones({2, 4}));
  CHECK_FALSE(channel.sink->seen.at(2).second.base_square.defined());
}

TEST_CASE("a capture without backward leaves nothing behind") {
  Channel channel(64);
  std::weak_ptr<Capture> trace;
  {
    const auto capture = channel.slot->capture(at::ones({2, 3}), {});
    trace = capture;
  }
  CHECK(trace.expired());
  CHECK(channel.sink->seen.empty());
  CHECK(channel.slot->observations() == 0);
}

TEST_CASE("only the first fitting gradient counts") {
  Channel channel(64);
  const auto capture = channel.slot->capture(at::ones({4, 3}), {});
  capture->complete(at::Tensor());
  capture->complete(at::ones({5, 2}));
  CHECK(channel.sink->seen.empty());
  capture->complete(at::full({4, 2}, 2.0));
  capture->complete(at::full({4, 2}, 3.0));
  REQUIRE(channel.sink->seen.size() == 1);
  CHECK(same_bits(channel.sink->seen.at(0).second.output_grads, at::full({4, 2}, 2.0)));
  CHECK(channel.slot->observations() == 1);
}

TEST_CASE("nothing is captured without a listener or without rows") {
  ObservationSlot lonely;
  CHECK_FALSE(lonely.wanted());
  lonely.set_wanted(true);
  CHECK(lonely.wanted());
  CHECK(lonely.capture(at::ones({2, 3}), {}) == nullptr);

  Channel channel(64);
  CHECK(channel.slot->capture(at::ones({0, 3}), {}) == nullptr);
  const auto capture = channel.slot->capture(at::ones({2, 3}), {});
  channel.sink.reset();  // the optimizer was deleted between forward and backward
  capture->complete(at::ones({2, 3}));
  CHECK(channel.slot->observations() == 0);
  CHECK(channel.slot->capture(at::ones({2, 3}), {}) == nullptr);
  channel.slot->connect({}, -1);
  CHECK(channel.slot->capture(at::ones({2, 3}), {}) == nullptr);

  Channel gone(64);
  const auto late = gone.slot->capture(at::ones({2, 3}), {});
  gone.slot.reset();
  late->complete(at::ones({2, 3}));
  CHECK(gone.sink->seen.empty());
}

TEST_CASE("a capture keeps neither the inputs nor the base output alive") {
  for (const int64_t sample_rows : {4, 64}) {
    Channel channel(sample_rows);
    at::Tensor x = at::ones({16, 3}), y = at::ones({16, 5});
    const at::Storage inputs = x.storage(), outputs = y.storage();
    const auto capture = channel.slot->capture(x, y);
    CHECK(x.use_count() == 1);
    x = at::Tensor();
    y = at::Tensor();
    CHECK(inputs.use_count() == 1);
    CHECK(outputs.use_count() == 1);
    capture->complete(at::ones({16, 5}));
    CHECK(channel.sink->seen.size() == 1);
  }
}

TEST_CASE("captured rows carry no graph and later changes of the inputs do not reach them") {
  Channel channel(64);
  const at::Tensor leaf = at::ones({4, 3}).requires_grad_();
  const at::Tensor x = leaf * 2;
  const auto capture = channel.slot->capture(x, x);
  x.detach().fill_(9.0);
  capture->complete(at::ones({4, 3}));
  const Observation& seen = channel.sink->seen.at(0).second;
  CHECK_FALSE(seen.inputs.requires_grad());
  CHECK_FALSE(seen.base_square.requires_grad());
  CHECK(same_bits(seen.inputs, at::full({4, 3}, 2.0)));
}

TEST_CASE("layers that receive one tensor in turn share one copy of its rows") {
  for (const int64_t sample_rows : {4, 64}) {
    Channel q(sample_rows, 0), k(sample_rows, 1);
    k.slot->connect(q.sink, 1);
    const at::Tensor x = randn({16, 3}), other = x.clone();
    const auto observe = [&](Channel& channel, const at::Tensor& inputs) {
      channel.slot->capture(inputs, {})->complete(at::ones({16, 2}));
      return std::exchange(q.sink->seen, {}).at(0).second.inputs;
    };
    const at::Tensor first = observe(q, x);
    CHECK(observe(k, x).is_same(first));
    CHECK_FALSE(observe(k, other).is_same(first));
    const at::Tensor again = observe(q, x);
    x.add_(1);  // the same tensor with other numbers
    const at::Tensor changed = observe(k, x);
    CHECK_FALSE(changed.is_same(again));
    CHECK(problems::error(changed, again + 1) < 1e-15);
    q.sink->rows.set_step(1);  // other rows, and nothing of an old step is kept
    CHECK_FALSE(observe(k, x).is_same(changed));
  }
}

TEST_CASE("inputs that come again with the gradient are sampled then, and never missed else") {
  at::manual_seed(3);
  for (const int64_t sample_rows : {4, 64}) {
    Channel channel(sample_rows);
    const at::Tensor x = randn({16, 3}), g = at::ones({16, 2});
    const at::Tensor all = RowSampler(sample_rows, 7).sample(16, 0, at::kCPU);
    const auto capture = channel.slot->capture(x, {}, /*saved=*/true);
    CHECK_FALSE(channel.sink->rows.rows_of(x, channel.sink->rows.sample(16, 0, at::kCPU))
                    ->values.defined());
    capture->complete(g, x);
    const Observation& seen = channel.sink->seen.at(0).second;
    CHECK(same_bits(seen.inputs, all.defined() ? x.index_select(0, all) : x));
    CHECK(seen.row_weight == (all.defined() ? 4.0 : 1.0));
    channel.sink->rows.set_step(1);
    channel.slot->capture(x, {}, /*saved=*/true)->complete(g);  // they did not come
    CHECK(channel.sink->seen.size() == 1);
    CHECK(channel.slot->observations() == 1);
  }
}

TEST_CASE("the registry's slot is the one that an engine finds") {
  const ctrlora::LoraPair pair = problems::make_pair(4, 3, 2);
  const auto slot = ctrlora::register_pair(pair);
  const auto sink = std::make_shared<RecordingSink>(64);
  ctrlora::find_slot(pair.b)->connect(sink, 5);
  slot->capture(at::ones({2, 3}), {})->complete(at::ones({2, 4}));
  CHECK(sink->seen.at(0).first == 5);
}
TEST_CASE("a slot is found by its handle while it lives") {
  auto first = ObservationSlot::make();
  const auto second = ObservationSlot::make();
  CHECK(first->handle() > 0);
  CHECK(second->handle() != first->handle());
  CHECK(ObservationSlot::find(first->handle()) == first);
  CHECK(ObservationSlot::find(second->handle()) == second);
  CHECK(ObservationSlot::find(0) == nullptr);
  CHECK(ObservationSlot::find(-1) == nullptr);
  const int64_t gone = first->handle();
  first.reset();
  CHECK(ObservationSlot::find(gone) == nullptr);
  CHECK(std::make_shared<ObservationSlot>()->handle() == 0);
  CHECK(ObservationSlot::make()->handle() != gone);  // numbers are not given twice
}
