// What a test cannot provoke by numbers: memory that runs out, decompositions that fail. LibTorch's
// own allocator and operators are replaced while a guard lives.
#include <ATen/CPUFunctions.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <atomic>
#include <random>
#include <thread>

#include "ctrlora/gauge.h"
#include "engine_model.h"

using ctrlora::GroupSettings;
using ctrlora::Options;
using problems::copy_of;
using problems::Model;
using problems::State;

namespace {

/// While it lives, memory for tensors runs out at the `countdown`-th request: of other threads than
/// the one that made it, or of that one.
class NoMemory : public c10::Allocator {
 public:
  NoMemory(int64_t countdown, bool elsewhere)
      : real_(c10::GetCPUAllocator()), countdown_(countdown), elsewhere_(elsewhere) {
    c10::SetCPUAllocator(this, /*priority=*/kPriority);
  }
  ~NoMemory() override { c10::SetCPUAllocator(real_, kPriority); }
  NoMemory(const NoMemory&) = delete;
  NoMemory& operator=(const NoMemory&) = delete;

  c10::DataPtr allocate(size_t bytes) override {
    if ((std::this_thread::get_id() != owner_) == elsewhere_ && countdown_-- == 0) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "no memory for ", bytes, " bytes");
    }
    return real_->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return real_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
  /// Whether the request came.
  [[nodiscard]] bool ran_out() const { return countdown_ < 0; }

 private:
  static constexpr uint8_t kPriority = 100;
  c10::Allocator* real_;
  std::atomic<int64_t> countdown_;
  bool elsewhere_;
  std::thread::id owner_ = std::this_thread::get_id();
};

std::function<bool()> cholesky_fails, eigh_fails;
int eigh_failures = 0;

std::tuple<at::Tensor, at::Tensor> failing_cholesky(const at::Tensor& a, bool upper, bool check) {
  auto [factor, info] = at::cpu::linalg_cholesky_ex(a, upper, check);
  if (cholesky_fails()) {  // LAPACK leaves what it has got so far
    factor.fill_(std::numeric_limits<double>::quiet_NaN());
    info.fill_(1);
  }
  return {factor, info};
}

std::tuple<at::Tensor, at::Tensor> failing_eigh(const at::Tensor& a,
                                                c10::string_view uplo,
                                                bool compute_vectors) {
  if (eigh_fails()) {
    ++eigh_failures;
    TORCH_CHECK_LINALG(false, "linalg.eigh: the algorithm failed to converge");
  }
  return at::cpu::_linalg_eigh(a, uplo, compute_vectors);
}

/// LAPACK's decompositions as the functions above say.
class Lapack {
 public:
  Lapack(std::function<bool()> cholesky, std::function<bool()> eigh)
      : library_(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__) {
    cholesky_fails = std::move(cholesky);
    eigh_fails = std::move(eigh);
    eigh_failures = 0;
    const problems::Warnings replaced;  // torch tells that an operator is
    library_.impl("linalg_cholesky_ex", &failing_cholesky);
    library_.impl("_linalg_eigh", &failing_eigh);
  }

 private:
  torch::Library library_;
};

Options quick() {
  Options options;
  options.sketch_rank = 3;
  options.factor_warmup_steps = 2;
  options.balance_every = 2;
  options.max_misses = 3;
  return options;
}

bool finite(const Model& model) {
  const State state = copy_of(model.engine);
  const std::vector<at::Tensor> parameters = model.parameters();
  const auto is = [](const at::Tensor& x) { return x.isfinite().all().item<bool>(); };
  return std::all_of(parameters.begin(), parameters.end(), is) &&
         std::all_of(state.begin(), state.end(), [&](const auto& item) {
           return item.first.find("probe") != std::string::npos || is(item.second);  // NaN at first
         });
}

void train(Model& model, int steps) {
  for (int step = 0; step < steps; ++step) {
    model.backward();
    model.engine.step({GroupSettings{}});
  }
}

template <typename Call>
std::string memory_error_of(const Call& call) {
  try {
    call();
  } catch (const c10::OutOfMemoryError& thrown) {
    return thrown.what_without_backtrace();
  }
  return "";
}

/// Each factor of `after` is the one of `before` or of `refreshed`, as a whole.
bool each_factor_whole(const State& after, const State& before, const State& refreshed) {
  for (const char* side : {"group0.input.", "group0.output."}) {
    const auto equals = [&](const State& other) {
      bool all = true;
      for (const char* part : {"basis", "eigenvalues", "trace"}) {
        all = all && problems::same_bits(after.at(std::string(side) + part),
                                         other.at(std::string(side) + part));
      }
      return all;
    };
    if (!equals(before) && !equals(refreshed)) {
      return false;
    }
  }
  return true;
}

}  // namespace

TEST_CASE("memory that runs out in a refresh beside training costs that refresh and no more") {
  Options options = quick();
  options.overlap = "thread";
  options.factor_every = 3;
  int failures = 0;
  for (int64_t request = 0;; request += 5) {
    at::manual_seed(3);
    Model whole(3, options);
    train(whole, 6);
    at::manual_seed(3);
    Model own(3, options);
    train(own, 5);
    own.backward();
    static_cast<void>(own.engine.named_tensors());  // joins the refresh of the step before
    bool ran_out = false;
    problems::Warnings warnings;
    {
      NoMemory guard(request, /*elsewhere=*/true);
      own.engine.step({GroupSettings{}});             // submits a refresh
      static_cast<void>(own.engine.named_tensors());  // joins it
      ran_out = guard.ran_out();
    }
    if (!ran_out) {
      CHECK(warnings.text.empty());
      break;
    }
    ++failures;
    CHECK(problems::contains(warnings.text,
                             "[ctrlora::Engine] a refresh of curvature factors failed and was left "
                             "out: no memory for "));
    CHECK(own.engine.steps() == 6);
    const auto parameters = own.parameters(), others = whole.parameters();
    for (size_t i = 0; i < parameters.size(); ++i) {  // this step did not need it
      CHECK(problems::same_bits(parameters[i], others[i]));
    }
    train(own, 4);
    CHECK(finite(own));
  }
  CHECK(failures > 10);
}

TEST_CASE("memory that runs out in a refresh leaves each factor as it was or whole") {
  const Options options = quick();  // inline: the factors themselves are written
  int failures = 0, refreshes = 0;
  for (int64_t request = 0;; request += 19) {
    at::manual_seed(5);
    Model other(3, options);
    train(other, 1);
    other.backward();
    at::manual_seed(5);
    Model own(3, options);
    train(own, 1);
    own.backward();
    const State before = copy_of(own.engine);
    other.engine.step({GroupSettings{}});
    bool ran_out = false;
    problems::Warnings warnings;
    std::string error;
    {
      NoMemory guard(request, /*elsewhere=*/false);
      error = memory_error_of([&] { own.engine.step({GroupSettings{}}); });
      ran_out = guard.ran_out();
    }
    const State after = copy_of(own.engine);
    if (!ran_out) {
      break;
    }
    ++failures;
    refreshes += warnings.text.empty() ? 0 : 1;
    // Within the refresh a warning, elsewhere torch's own error: never silence.
    CHECK(error.empty() != warnings.text.empty());
    CHECK(problems::contains(error + warnings.text, "no memory for "));
    CHECK(each_factor_whole(after, before, copy_of(other.engine)));
    train(own, 4);
    CHECK(finite(own));
  }
  CHECK(refreshes > 5);
  CHECK(failures > 50);
}

TEST_CASE("decompositions that fail, all or at random, never stop training") {
  std::mt19937 random(8);
  for (const double share : {1.0, 0.5, 0.1}) {
    std::bernoulli_distribution fails(share);
    const auto draw = [&] { return fails(random); };
    at::manual_seed(9);
    Model own(4, quick());
    const std::vector<at::Tensor> before = own.parameters();
    problems::Warnings warnings;
    {
      const Lapack guard(draw, draw);
      train(own, 14);
      CHECK(eigh_failures > 0);
    }
    CHECK(own.engine.steps() == 14);
    CHECK(finite(own));
    if (share == 1.0) {  // nothing could be computed: AdamW has them all by now
      CHECK(own.engine.metrics().at("retired") == 4);
      CHECK(problems::contains(warnings.text, "failed 3 times in a row; AdamW trains it"));
    }
    train(own, 6);
    CHECK(finite(own));
    for (size_t i = 0; i < before.size(); ++i) {
      CHECK_FALSE(problems::same_bits(own.parameters()[i], before[i]));
    }
  }
}

TEST_CASE(
    "an eigendecomposition that fails keeps the basis, is counted, and the next one heals it") {
  at::manual_seed(10);
  Options options = quick();
  options.factor_warmup_steps = 3;  // every step refreshes every layer
  Model own(2, options);
  train(own, 1);
  const State before = copy_of(own.engine);
  {
    const Lapack guard([] { return false; }, [] { return true; });
    train(own, 1);
  }
  const State after = copy_of(own.engine);
  for (const char* part : {"input.basis", "input.eigenvalues", "output.trace"}) {
    CHECK(problems::same_bits(after.at(std::string("group0.") + part),
                              before.at(std::string("group0.") + part)));
  }
  CHECK(after.at("group0.factor_misses").eq(1).all().item<bool>());
  train(own, 1);
  const State healed = copy_of(own.engine);
  CHECK(healed.at("group0.factor_misses").eq(0).all().item<bool>());
  CHECK_FALSE(
      problems::same_bits(healed.at("group0.input.basis"), before.at("group0.input.basis")));
}

TEST_CASE("one layer's decomposition that fails leaves the others' as they are") {
  int calls = 0;
  // The batched call fails, then layer 1 alone.
  const Lapack guard([] { return false; }, [&] { return calls == 0 ? ++calls > 0 : ++calls == 3; });
  const at::Tensor gram_b = at::eye(2, at::kDouble).mul(4).expand({3, 2, 2}).contiguous();
  const at::Tensor gram_a = at::eye(2, at::kDouble).expand({3, 2, 2}).contiguous();
  const ctrlora::GaugeMap gauge = ctrlora::balance(gram_b, gram_a);
  CHECK(problems::same_bits(gauge.ok, at::tensor({1, 0, 1}, at::kInt).to(at::kBool)));
  CHECK(problems::same_bits(gauge.map[1], at::eye(2, at::kDouble)));
  CHECK(problems::error(gauge.sigma[2], at::full({2}, 2.0, at::kDouble)) < 1e-14);
}
