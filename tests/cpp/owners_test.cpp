// Owners: several processes, as threads, that divide the decompositions of one refresh.
#include <c10/core/GradMode.h>

#include <atomic>
#include <barrier>
#include <thread>

#include "ctrlora/kronecker_factors.h"
#include "ctrlora/processes.h"
#include "problems.h"

namespace {

using ctrlora::CurvatureSketch;
using ctrlora::FactorSketch;
using ctrlora::KroneckerFactors;
using ctrlora::LowRankEigen;
using ctrlora::Options;
using ctrlora::Processes;
using problems::randn;
using problems::same_bits;

/// Several processes in one program: what each hands over is added up in order of their ranks.
class Team {
 public:
  explicit Team(int64_t count) : given_(static_cast<size_t>(count)), all_here_(count) {}

  std::shared_ptr<const Processes> process(int64_t rank) {
    const auto own = static_cast<size_t>(rank);
    const auto sum = [this, own](const std::vector<at::Tensor>& tensors) {
      given_[own].clear();
      for (const at::Tensor& tensor : tensors) {
        given_[own].push_back(tensor.clone());
      }
      all_here_.arrive_and_wait();
      for (size_t i = 0; i < tensors.size(); ++i) {
        tensors[i].zero_();
        for (const auto& other : given_) {
          tensors[i].add_(other[i]);
        }
      }
      all_here_.arrive_and_wait();
    };
    return std::make_shared<const Processes>(
        Processes{sum, rank, static_cast<int64_t>(given_.size())});
  }
  /// What a process handed over last.
  [[nodiscard]] const std::vector<at::Tensor>& given(int64_t rank) const {
    return given_[static_cast<size_t>(rank)];
  }

 private:
  std::vector<std::vector<at::Tensor>> given_;
  std::barrier<> all_here_;
};

struct Shape {
  int64_t layers, in, out;
};

// Wide sides, one narrow side that everybody decomposes, and a complete one.
const std::vector<Shape> kShapes{{3, 130, 200}, {2, 100, 12}, {1, 2, 96}};

std::vector<KroneckerFactors> new_factors(const Options& options, at::ScalarType dtype) {
  std::vector<KroneckerFactors> out;
  for (const Shape& shape : kShapes) {
    out.emplace_back(shape.layers, shape.in, shape.out, options, at::TensorOptions(dtype));
  }
  return out;
}

FactorSketch of_rows(const LowRankEigen& factor, const at::Tensor& rows) {
  return factor.sketch(rows, at::ones({rows.size(0), rows.size(1)}, at::kDouble));
}

// One batch of every shape, in the present bases; a layer of the first shape saw nothing.
std::vector<KroneckerFactors::Commit> batch(const std::vector<KroneckerFactors>& factors,
                                            const std::vector<at::Tensor>& rows,
                                            bool first) {
  std::vector<KroneckerFactors::Commit> out;
  for (size_t i = 0; i < factors.size(); ++i) {
    KroneckerFactors own = factors[i];
    const at::Tensor x = rows[2 * i], g = rows[2 * i + 1];
    const at::Tensor all = at::ones({x.size(0)}, at::kBool);
    if (first) {
      own.input.start_basis(x, all, 1);
      own.output.start_basis(g, all, 2);
    }
    CurvatureSketch sketch{of_rows(own.input, x), of_rows(own.output, g),
                           at::ones({x.size(0)}, at::kDouble), at::ones({x.size(0)}, at::kDouble),
                           at::zeros({x.size(0)}, at::kBool)};
    if (i == 0) {
      sketch.output.weight[1].zero_();
    }
    out.push_back({own, sketch});
  }
  return out;
}

std::vector<at::Tensor> random_rows(at::ScalarType dtype) {
  std::vector<at::Tensor> rows;
  for (const Shape& shape : kShapes) {
    rows.push_back(randn({shape.layers, 20, shape.in}, dtype));
    rows.push_back(randn({shape.layers, 20, shape.out}, dtype));
  }
  return rows;
}

std::vector<at::Tensor> state_of(const std::vector<KroneckerFactors>& factors) {
  std::vector<at::Tensor> out;
  for (const KroneckerFactors& own : factors) {
    for (const auto& item : own.named_tensors()) {
      out.push_back(item.second.clone());
    }
  }
  return out;
}

void check_same(const std::vector<at::Tensor>& x, const std::vector<at::Tensor>& y) {
  REQUIRE(x.size() == y.size());
  for (size_t i = 0; i < x.size(); ++i) {
    CHECK(same_bits(x[i], y[i]));
  }
}

// f(rank) of `count` processes at once.
void together(int64_t count, const std::function<void(int64_t)>& f) {
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < count; ++rank) {
    threads.emplace_back([&f, rank] {
      const c10::AutoGradMode no_grad(false);
      f(rank);
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

}  // namespace

TEST_CASE("factors refreshed by owners have the bits of an undivided refresh in every process") {
  Options options;
  options.sketch_rank = 2;
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    for (const int64_t count : {2, 3, 20}) {  // 20: some own nothing
      at::manual_seed(3);
      Team team(count);
      std::vector<KroneckerFactors> alone = new_factors(options, dtype);
      std::vector<std::vector<KroneckerFactors>> divided;
      for (int64_t rank = 0; rank < count; ++rank) {
        divided.push_back(new_factors(options, dtype));
      }
      for (int round = 0; round < 3; ++round) {
        const std::vector<at::Tensor> rows = random_rows(dtype);
        const std::vector<at::Tensor> before = state_of(alone);
        KroneckerFactors::commit_all(batch(alone, rows, round == 0), options);
        together(count, [&](int64_t rank) {
          const auto commits = batch(divided[static_cast<size_t>(rank)], rows, round == 0);
          const auto owners = KroneckerFactors::owners(commits, team.process(rank));
          KroneckerFactors::commit_all(commits, options, owners.get());
        });
        CHECK_FALSE(same_bits(before[4], state_of(alone)[4]));
        for (const auto& own : divided) {
          check_same(state_of(own), state_of(alone));
        }
      }
    }
  }
}

TEST_CASE("a process that leaves makes all leave out the refresh") {
  at::manual_seed(4);
  Options options;
  options.sketch_rank = 2;
  Team team(3);
  std::vector<std::vector<KroneckerFactors>> all;
  for (int rank = 0; rank < 3; ++rank) {
    all.push_back(new_factors(options, at::kFloat));
  }
  std::vector<at::Tensor> before;
  for (const bool leaves : {false, true, false}) {
    const std::vector<at::Tensor> rows = random_rows(at::kFloat);
    before = state_of(all[0]);
    const bool first = before[1].eq(0).all().item<bool>();
    std::atomic<int> thrown{0};
    together(3, [&](int64_t rank) {
      auto commits = batch(all[static_cast<size_t>(rank)], rows, first);
      const auto owners = KroneckerFactors::owners(commits, team.process(rank));
      if (leaves && rank == 1) {
        commits[1].sketch.input.trace = at::ones({7}, at::kDouble);  // of no layer: throws
      }
      try {
        KroneckerFactors::commit_all(commits, options, owners.get());
      } catch (const c10::Error&) {
        ++thrown;
      }
    });
    CHECK(thrown == (leaves ? 1 : 0));
    CHECK(same_bits(before[4], state_of(all[0])[4]) == leaves);
    for (const auto& own : all) {
      check_same(state_of(own), leaves ? before : state_of(all[0]));
    }
  }
}

TEST_CASE("every layer is sent by one process, and all own about as much work") {
  at::manual_seed(5);
  Options options;
  options.sketch_rank = 2;
  constexpr int64_t kCount = 3, kLayers = 3 + 3 + 2 + 1;  // the wide sides
  const at::Tensor work = at::tensor({130, 130, 130, 200, 200, 200, 100, 100, 96}, at::kLong);
  Team team(kCount);
  const std::vector<at::Tensor> rows = random_rows(at::kFloat);
  std::vector<KroneckerFactors> own[kCount];
  together(kCount, [&](int64_t rank) {
    own[rank] = new_factors(options, at::kFloat);
    const auto commits = batch(own[rank], rows, true);
    const auto owners = KroneckerFactors::owners(commits, team.process(rank));
    KroneckerFactors::commit_all(commits, options, owners.get());
  });
  at::Tensor owned = at::zeros({kLayers}, at::kLong);
  for (int64_t rank = 0; rank < kCount; ++rank) {
    const at::Tensor maps = team.given(rank)[0];
    CHECK(maps.numel() == kLayers * 3 * 2 * 2);  // no other side's
    CHECK((maps.scalar_type() == at::kFloat));
    const at::Tensor mine = maps.view({kLayers, -1}).ne(0).any(1);
    const int64_t share = (mine * work).sum().item<int64_t>();
    CHECK(std::abs(share - work.sum().item<int64_t>() / kCount) <= 200 / 2);
    owned += mine;
  }
  CHECK(owned.eq(1).all().item<bool>());
}
