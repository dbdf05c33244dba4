#include "ctrlora/lora_pair.h"

#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "ctrlora/observation.h"
#include "problems.h"

namespace {

using ctrlora::find_pair;
using ctrlora::find_slot;
using ctrlora::LoraPair;
using ctrlora::register_pair;
using ctrlora::unregister_pair;
using problems::contains;
using problems::error_of;
using problems::make_pair;

std::string message(const at::Tensor& a, const at::Tensor& b, double scaling = 1.0) {
  const LoraPair pair{a, b, scaling, "blocks.3.q"};
  const std::string text = error_of([&] { pair.validate(); });
  // Registering says the same and leaves nothing behind.
  CHECK(error_of([&] { register_pair(pair); }) == text);
  if (!text.empty() && a.defined()) {
    CHECK_FALSE(find_pair(a).has_value());
  }
  return text;
}

}  // namespace

TEST_CASE("a pair knows its sizes") {
  const LoraPair pair = make_pair(7, 5, 3);
  CHECK(pair.out_features() == 7);
  CHECK(pair.in_features() == 5);
  CHECK(pair.rank() == 3);
  CHECK(error_of([&] { pair.validate(); }).empty());
}

TEST_CASE(
    "float16, bfloat16, float32 and float64 pairs are valid; layouts of strides do not matter") {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble}) {
    CHECK(message(at::ones({2, 5}, dtype), at::ones({4, 2}, dtype)).empty());
  }
  CHECK(message(at::ones({5, 2}).t(), at::ones({4, 2})).empty());
}

TEST_CASE("shapes that do not fit name the pair and both shapes") {
  const auto check = [](at::IntArrayRef a, at::IntArrayRef b) {
    const std::string text = message(at::ones(a), at::ones(b));
    CHECK(contains(text, "[ctrlora::LoraPair] pair 'blocks.3.q': expected a (r, n) and b (m, r)"));
    CHECK(contains(text, c10::str("got a ", a, " and b ", b, ".")));
    CHECK(contains(text, "Remedy: check that lora_A and lora_B belong to the same layer."));
  };
  check({3, 5}, {4, 2});     // two ranks
  check({5, 3}, {4, 5, 1});  // not a matrix
  check({5}, {4, 5});
  check({0, 5}, {4, 0});  // no rank
  check({3, 0}, {4, 3});  // no input
  check({2, 4}, {2, 4});  // a and b exchanged
}

TEST_CASE("tensors that no step could train are refused by name") {
  const at::Tensor b = at::ones({4, 2});
  const auto check = [&](const at::Tensor& a, const std::string& described) {
    const std::string text = message(a, b);
    CHECK(contains(text, "pair 'blocks.3.q': expected dense real floating-point tensors; got a "));
    CHECK(contains(text, described));
    CHECK(contains(text, "and b [4, 2] Float on cpu."));
    CHECK(contains(text, "Remedy: train such parameters with another optimizer."));
  };
  check(at::ones({2, 5}, at::kInt), "[2, 5] Int on cpu");
  check(at::ones({2, 5}, at::kByte), "[2, 5] Byte on cpu");
  check(at::ones({2, 5}, at::kComplexFloat), "[2, 5] ComplexFloat on cpu");
  check(at::ones({2, 5}).to_sparse(), "[2, 5] Float on cpu");
  CHECK(contains(message(b.t().contiguous(), at::ones({4, 2}, at::kLong)), "[4, 2] Long on cpu"));
}

TEST_CASE("two dtypes or two devices are refused by name") {
  const at::Tensor a = at::ones({2, 5});
  const std::string dtypes = message(a, at::ones({4, 2}, at::kDouble));
  CHECK(contains(dtypes, "pair 'blocks.3.q': expected a and b on one device with one dtype"));
  CHECK(contains(dtypes, "got a [2, 5] Float on cpu and b [4, 2] Double on cpu."));
  CHECK(contains(dtypes, "Remedy: move both, e.g. layer.to(device)."));
  CHECK(contains(message(a, at::empty({4, 2}, at::device(at::kMeta))),
                 "got a [2, 5] Float on cpu and b [4, 2] Float on meta."));
}

TEST_CASE("undefined tensors and scalings without meaning are refused") {
  const at::Tensor a = at::ones({2, 5});
  const at::Tensor b = at::ones({4, 2});
  CHECK(contains(message({}, b), "expected two tensors a and b; got an undefined one."));
  CHECK(contains(message(a, {}), "expected two tensors a and b; got an undefined one."));
  CHECK(contains(message(a, b, 0.0), "expected a finite scaling other than 0; got 0."));
  CHECK(contains(message(a, b, std::numeric_limits<double>::infinity()), "got inf."));
  CHECK(contains(message(a, b, std::numeric_limits<double>::quiet_NaN()), "got nan."));
  CHECK(message(a, b, -2.0).empty());
}

TEST_CASE("a registered pair is found by either tensor") {
  const LoraPair pair = make_pair(4, 5, 2);
  const auto slot = register_pair(pair);
  REQUIRE(slot != nullptr);
  for (const at::Tensor& tensor : {pair.a, pair.b}) {
    const std::optional<LoraPair> found = find_pair(tensor);
    REQUIRE(found.has_value());
    CHECK(found->a.is_same(pair.a));
    CHECK(found->b.is_same(pair.b));
    CHECK(found->scaling == 1.5);
    CHECK(found->name == "layer");
    CHECK(find_slot(tensor) == slot);
  }
  // Identity counts, not storage.
  CHECK_FALSE(find_pair(pair.a.detach()).has_value());
  CHECK(find_slot(pair.a.detach()) == nullptr);
  CHECK_FALSE(find_pair({}).has_value());
}

TEST_CASE("registering again returns the same slot and takes over scaling and name") {
  LoraPair pair = make_pair(4, 5, 2);
  const auto slot = register_pair(pair);
  pair.scaling = 4.0;
  pair.name = "renamed";
  CHECK(register_pair(pair) == slot);
  CHECK(find_pair(pair.b)->scaling == 4.0);
  CHECK(find_pair(pair.a)->name == "renamed");
}

TEST_CASE("tied tensors are refused and the first pair stays") {
  const LoraPair first = make_pair(4, 5, 2);
  LoraPair second = make_pair(4, 5, 2);
  second.name = "tied";
  const auto slot = register_pair(first);
  const at::Tensor other_b = second.b;
  second.b = first.b;
  const std::string text = error_of([&] { register_pair(second); });
  CHECK(
      contains(text, "[ctrlora::register_pair] pair 'tied': one of its tensors is already paired"));
  CHECK(contains(text, "in 'layer'"));
  CHECK(contains(text, "Remedy: unregister that pair first."));
  CHECK(find_slot(first.b) == slot);
  CHECK_FALSE(find_pair(second.a).has_value());

  // Two pairs crossed: both tensors known, not to each other.
  second.b = other_b;
  register_pair(second);
  const LoraPair crossed{first.a, second.b, 1.0, "crossed"};
  CHECK(contains(error_of([&] { register_pair(crossed); }), "pair 'crossed'"));

  unregister_pair(first.b);
  unregister_pair(second.a);
  CHECK(register_pair(crossed) != slot);
}

TEST_CASE("either tensor takes a pair out; strangers are ignored") {
  const LoraPair pair = make_pair(4, 5, 2);
  for (const at::Tensor& tensor : {pair.a, pair.b}) {
    const auto slot = register_pair(pair);
    unregister_pair(at::ones({2}));
    unregister_pair(at::Tensor());
    CHECK(find_slot(pair.a) == slot);
    unregister_pair(tensor);
    CHECK_FALSE(find_pair(pair.a).has_value());
    CHECK_FALSE(find_pair(pair.b).has_value());
  }
}

TEST_CASE("the registry keeps no tensor alive and an entry dies with either of them") {
  LoraPair pair = make_pair(4, 5, 2);
  const at::Storage storage = pair.a.storage();
  const std::weak_ptr<ctrlora::ObservationSlot> slot = register_pair(pair);
  CHECK(pair.a.use_count() == 1);
  CHECK(pair.b.use_count() == 1);
  CHECK(storage.use_count() == 2);

  pair.a = at::Tensor();
  CHECK(storage.use_count() == 1);  // the parameter's memory is free, not only its name
  CHECK_FALSE(find_pair(pair.b).has_value());
  CHECK(find_slot(pair.b) == nullptr);
  unregister_pair(pair.b);  // of a dead entry: ignored

  // The survivor may be paired anew; the dead entry and its slot are swept then.
  pair.a = at::ones({2, 5}, at::kDouble);
  CHECK(register_pair(pair) != nullptr);
  CHECK(slot.expired());
  CHECK(find_pair(pair.b)->a.is_same(pair.a));
}

TEST_CASE("threads may register, find and drop pairs at the same time") {
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&wrong] {
      for (int i = 0; i < 200; ++i) {
        const LoraPair pair{at::ones({1, 2}), at::ones({2, 1}), 1.0 + i, "threaded"};
        const auto slot = register_pair(pair);
        const std::optional<LoraPair> found = find_pair(pair.b);
        wrong += found.has_value() && found->scaling == pair.scaling && found->a.is_same(pair.a) &&
                         find_slot(pair.a) == slot
                     ? 0
                     : 1;
        if (i % 2 == 0) {
          unregister_pair(pair.a);
        }
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  CHECK(wrong == 0);
}
