// Processes: sums of several engines in one program, against one engine that saw all rows.
#include "ctrlora/processes.h"

#include <memory>
#include <vector>

#include "ctrlora/engine.h"
#include "engine_model.h"

namespace {

using ctrlora::CurvatureSketch;
using ctrlora::Engine;
using ctrlora::GroupSettings;
using ctrlora::Options;
using ctrlora::Processes;
using problems::contains;
using problems::error;
using problems::error_of;
using problems::Model;
using problems::numbers;
using problems::randn;

CurvatureSketch random_sketch(bool proxy) {
  const auto side = [](int64_t size) {
    return ctrlora::FactorSketch{randn({2, size, 3}), randn({2}).abs(), randn({2}).abs()};
  };
  return {side(5), side(4), randn({2}), randn({2}), at::full({2}, proxy, at::kBool)};
}

// The tensors that a process hands to all_reduce.
std::vector<at::Tensor> sent_by(const CurvatureSketch& own) {
  std::vector<at::Tensor> out;
  Processes one;
  one.all_reduce = [&](const std::vector<at::Tensor>& tensors) {
    for (const at::Tensor& tensor : tensors) {
      out.push_back(tensor.clone());
    }
  };
  (void)one.sum(own, true);
  return out;
}

// One process of several that run in turn: the others' tensors are added from what they sent.
Processes among(const std::vector<std::vector<at::Tensor>>& others, int64_t rank) {
  const auto add = [others](const std::vector<at::Tensor>& tensors) {
    for (const auto& sent : others) {
      for (size_t i = 0; i < tensors.size(); ++i) {
        tensors[i].add_(sent[i]);
      }
    }
  };
  return {add, rank, static_cast<int64_t>(others.size()) + 1};
}

}  // namespace

TEST_CASE("sums are those of all processes; a mean loss divides g by their number") {
  at::manual_seed(1);
  const CurvatureSketch x = random_sketch(true), y = random_sketch(true), z = random_sketch(false);
  const Processes three = among({sent_by(y), sent_by(z)}, 0);
  for (const bool mean : {false, true}) {
    const double square = mean ? 1.0 / 9.0 : 1.0;
    const CurvatureSketch sum = three.sum(x, mean);
    const at::Tensor input = x.input.product + y.input.product + z.input.product;
    const at::Tensor output = x.output.product + y.output.product + z.output.product;
    CHECK(error(sum.input.product, input) < 1e-14);
    CHECK(error(sum.output.product, square * output) < 1e-14);
    CHECK(error(sum.input.trace, x.input.trace + y.input.trace + z.input.trace) < 1e-14);
    CHECK(error(sum.input.weight, x.input.weight + y.input.weight + z.input.weight) < 1e-14);
    CHECK(error(sum.output.trace, square * (x.output.trace + y.output.trace + z.output.trace)) <
          1e-14);
    CHECK(error(sum.output.weight, x.output.weight + y.output.weight + z.output.weight) < 1e-14);
    CHECK(error(sum.base_square, x.base_square + y.base_square + z.base_square) < 1e-14);
    CHECK(error(sum.sequences, x.sequences + y.sequences + z.sequences) < 1e-14);
    CHECK_FALSE(sum.from_gradient.any().item<bool>());  // one process observed the layers
  }
  CHECK(among({sent_by(y)}, 0).sum(x, true).from_gradient.all().item<bool>());
}

TEST_CASE("engines of two processes end where one that saw all rows does") {
  // In turn, not at once: what each would send is found by a trial run from the same state.
  at::manual_seed(2);
  Options options;
  options.kl_radius = 0.01;
  options.exchange_every = options.factor_every;  // as often as one process
  constexpr int64_t kRows = 24, kHalf = 12;
  Model whole(2, options), left(2, options), right(2, options);
  for (size_t l = 0; l < 2; ++l) {
    for (Model* other : {&left, &right}) {
      other->pairs[l].a.detach().copy_(whole.pairs[l].a.detach());
      other->pairs[l].b.detach().copy_(whole.pairs[l].b.detach());
    }
  }
  for (int step = 0; step < 8; ++step) {
    whole.random_gradients();
    std::vector<at::Tensor> x, g, y;
    for (size_t l = 0; l < 2; ++l) {
      x.push_back(randn({kRows, Model::kIn}));
      g.push_back(randn({kRows, Model::kOut}));
      y.push_back(randn({kRows, Model::kOut}));
      for (Model* other : {&left, &right}) {
        other->pairs[l].a.mutable_grad() = whole.pairs[l].a.grad();
        other->pairs[l].b.mutable_grad() = whole.pairs[l].b.grad();
      }
    }
    // A process' own loss is the mean over its half: its g is twice the joint one.
    const auto observe = [&](Model& model, int64_t begin, int64_t count, double scale) {
      for (size_t l = 0; l < 2; ++l) {
        const auto part = [&](const at::Tensor& t) { return t.narrow(0, begin, count); };
        if (count > 0 && model.slots[l]->wanted()) {
          model.slots[l]->capture(part(x[l]), part(y[l]))->complete(part(g[l]) * scale);
        }
      }
    };
    const int64_t mine = step == 5 ? kRows : kHalf;  // once all rows are on one side
    const double scale = 2.0;
    std::vector<std::vector<at::Tensor>> sent(2);
    const std::vector<Model*> both{&left, &right};
    for (const bool trial : {true, false}) {
      for (size_t p = 0; p < 2; ++p) {
        const problems::State before = problems::copy_of(both[p]->engine);
        const std::vector<at::Tensor> parameters = both[p]->parameters();
        size_t call = 0;
        std::vector<at::Tensor> own;
        both[p]->engine.set_processes({[&](const std::vector<at::Tensor>& tensors) {
                                         for (const at::Tensor& tensor : tensors) {
                                           own.push_back(tensor.clone());
                                           if (!trial) {
                                             tensor.add_(sent[1 - p][call++]);
                                           }
                                         }
                                       },
                                       static_cast<int64_t>(p), 2});
        observe(*both[p], p == 0 ? 0 : mine, p == 0 ? mine : kRows - mine, scale);
        both[p]->engine.step({GroupSettings{}});
        if (trial) {
          sent[p] = own;
          both[p]->engine.load(before);
          for (size_t l = 0; l < 2; ++l) {
            both[p]->pairs[l].a.detach().copy_(parameters[2 * l]);
            both[p]->pairs[l].b.detach().copy_(parameters[2 * l + 1]);
          }
        }
      }
    }
    observe(whole, 0, kRows, 1.0);
    whole.engine.step({GroupSettings{}});
    CHECK(problems::same(problems::copy_of(left.engine), problems::copy_of(right.engine)));
    for (size_t i = 0; i < 4; ++i) {
      CHECK(error(left.parameters()[i], whole.parameters()[i]) < 1e-9);
      CHECK(problems::same_bits(left.parameters()[i], right.parameters()[i]));
    }
  }
}

TEST_CASE("numbers that make no sense are refused") {
  Engine engine{Options{}};
  const auto nothing = [](const std::vector<at::Tensor>&) {};
  const auto message = [&](Processes given) {
    return error_of([&] { engine.set_processes(std::move(given)); });
  };
  CHECK(
      contains(message({nothing, 2, 2}),
               "[ctrlora::Processes] rank = 2, count = 2. Violated constraint: 0 <= rank < count"));
  CHECK(contains(message({nullptr, 0, 2}), "expected a function all_reduce; got none."));
  CHECK(message({nothing, 1, 2}).empty());
}

TEST_CASE("sketches are exchanged as often as keeps them at 1/24 of the gradients' bytes") {
  CHECK(Processes::exchange_every({100, 100}) == 24);
  CHECK(Processes::exchange_every({100, 200}) == 12);
  CHECK(Processes::exchange_every({101, 200}) == 13);  // never more than that share
  CHECK(Processes::exchange_every({1, 1000}) == 1);
  CHECK(Processes::exchange_every({0, 0}) == 1);
  CHECK(Processes::exchange_every({100, 200, 2}) == 16);  // 48 / 200 of what there is are taken
  CHECK(Processes::exchange_every({100, 200, 100}) == 24);
  CHECK((Processes::sent_dtype(at::kFloat) == at::kBFloat16));
  CHECK((Processes::sent_dtype(at::kDouble) == at::kDouble));
}

TEST_CASE("the schedule follows from sketch, rank and dtype, and is in the state") {
  const auto nothing = [](const std::vector<at::Tensor>&) {};
  const auto every = [&](int64_t exchange_every, int64_t sketch_rank, at::ScalarType dtype) {
    Options options;
    options.exchange_every = exchange_every;
    options.sketch_rank = sketch_rank;
    Model model(3, options, true, dtype);
    model.engine.set_processes({nothing, 0, 2});
    return problems::copy_of(model.engine).at("observe_every").item<int64_t>();
  };
  static_assert(Model::kRank == 2);
  CHECK(every(0, 2, at::kFloat) == 12);  // bfloat16 is sent beside float32 gradients
  CHECK(every(0, 4, at::kFloat) == 24);
  CHECK(every(0, 1, at::kFloat) == 6);
  CHECK(every(0, 2, at::kDouble) == 24);
  CHECK(every(0, 2, at::kBFloat16) == 24);
  CHECK(every(7, 2, at::kFloat) == 7);
}

TEST_CASE("sketches for rank events leave less to the factors, whichever is set first") {
  const auto nothing = [](const std::vector<at::Tensor>&) {};
  const auto every = [&](int64_t total_steps, bool processes_first) {
    Options options;
    options.sketch_rank = Model::kRank;
    Model model(3, options, true, at::kFloat);
    ctrlora::RankOptions ranks;
    ranks.budget = 3 * (Model::kIn + Model::kOut);
    ranks.schedule.total_steps = total_steps;
    ranks.candidates = 1;
    if (processes_first) {
      model.engine.set_processes({nothing, 0, 2});
    }
    model.engine.schedule_ranks(ranks);
    if (!processes_first) {
      model.engine.set_processes({nothing, 0, 2});
    }
    return problems::copy_of(model.engine).at("observe_every").item<int64_t>();
  };
  for (const bool processes_first : {false, true}) {
    CHECK(every(1000, processes_first) > 12);
    CHECK(every(1000, processes_first) < 24);
    CHECK(every(100, processes_first) == 24);
    CHECK(every(1000000, processes_first) == 12);
  }
}
