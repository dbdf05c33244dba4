#include "ctrlora/rank_scheduler.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "problems.h"

namespace {

using ctrlora::allocate_ranks;
using ctrlora::LayerPlan;
using ctrlora::plan_ranks;
using ctrlora::RankLayer;
using ctrlora::RankRules;
using ctrlora::RankSchedule;
using ctrlora::RankUtilities;
using problems::contains;
using problems::error_of;

using Ranks = std::vector<int64_t>;
using Utilities = std::vector<std::vector<double>>;

const std::vector<RankLayer> kThree = {{"x", 4, 6, 4}, {"y", 4, 6, 4}, {"z", 20, 20, 4}};

Ranks ranks_of(const std::vector<LayerPlan>& plan) {
  Ranks ranks;
  for (const LayerPlan& layer : plan) {
    ranks.push_back(layer.to);
  }
  return ranks;
}

bool still(const LayerPlan& layer) {
  return layer.dropped.empty() && layer.grown.empty();
}

}  // namespace

TEST_CASE("rank schedule: events at 5 %, then every max(8 steps, 2 %), until 90 %") {
  const auto events = [](const RankSchedule& schedule) {
    Ranks steps;
    for (int64_t t = 0; t <= schedule.total_steps; ++t) {
      if (schedule.due(t)) {
        steps.push_back(t);
      }
    }
    return steps;
  };
  const RankSchedule sparse{.total_steps = 400, .last = 0.7, .min_steps = 50};
  CHECK(events(sparse) == Ranks{20, 70, 120, 170, 220, 270});
  CHECK(sparse.last_event() == 270);
  const Ranks many = events({.total_steps = 10000});
  CHECK(many.front() == 500);
  CHECK(many[1] == 700);
  CHECK(many.back() == 8900);
  CHECK(many.size() == 43);
  CHECK(events({.total_steps = 50}) == Ranks{3, 11, 19, 27, 35, 43});
  CHECK(events({.total_steps = 1}).empty());
  CHECK(events({.total_steps = 10}) == Ranks{1, 9});  // never before the first step has been taken
  CHECK(events({.total_steps = 100, .last = 0.05}) == Ranks{5});  // first and last in one
  CHECK(events({.total_steps = 30, .min_steps = 3}) == Ranks{2, 5, 8, 11, 14, 17, 20, 23, 26});
}

TEST_CASE("rank schedule: cubic descent from all that is allocated to the budget") {
  const RankSchedule schedule{.total_steps = 400, .last = 0.7, .min_steps = 50, .descend = true};
  CHECK(schedule.budget_at(0, 1000, 9000) == 9000);
  CHECK(schedule.budget_at(19, 1000, 9000) == 9000);
  CHECK(schedule.budget_at(20, 1000, 9000) == 1000 + 296);  // one event of 1.5: (1/3)^3
  CHECK(schedule.budget_at(70, 1000, 9000) == 1000);
  const RankSchedule many{.total_steps = 10000, .descend = true};  // 43 events, 10.75 of descent
  CHECK(many.budget_at(500, 0, 1000000) == 746085);                // (1 - 4/43)^3, rounded down
  CHECK(many.budget_at(1300, 0, 1000000) == 153030);               // (1 - 20/43)^3
  CHECK(many.budget_at(2500, 0, 1000000) == 0);
  CHECK(schedule.budget_at(399, 1000, 9000) == 1000);
  CHECK(RankSchedule{.total_steps = 400}.budget_at(0, 1000, 9000) == 1000);
}

TEST_CASE("rank schedule: what is out of range is named") {
  const auto message = [](const RankSchedule& s) { return error_of([&] { s.validate(); }); };
  CHECK(contains(message({}), "total_steps = 0. Violated constraint: total_steps >= 1"));
  CHECK(
      contains(message({.total_steps = 9, .first = 0.8, .last = 0.7}), "first = 0.8, last = 0.7"));
  CHECK(contains(message({.total_steps = 9, .last = 1.1}), "last = 1.1"));
  CHECK(contains(message({.total_steps = 9, .every = -1}), "every = -1"));
  CHECK(contains(message({.total_steps = 9, .min_steps = 0}), "min_steps = 0"));
  CHECK(contains(message({.total_steps = 1, .descend = true}), "never reaches its budget"));
  CHECK(message({.total_steps = 1}).empty());
}

TEST_CASE("rank rules and budget: what is out of range is named") {
  const auto rule = [](const RankRules& rules) { return error_of([&] { rules.validate(); }); };
  CHECK(contains(rule({.min_rank = -1}), "min_rank = -1"));
  CHECK(contains(rule({.hysteresis = 0.9}), "hysteresis = 0.9"));
  CHECK(contains(rule({.max_move = 0}), "max_move = 0"));
  const auto budget = [](int64_t value, int64_t min_rank) {
    return error_of([&] { check_budget(kThree, value, {.min_rank = min_rank}); });
  };
  CHECK(budget(60, 1).empty());
  CHECK(contains(budget(59, 1), "rank 1 in each of 3 layers takes 60"));
  CHECK(contains(budget(0, 0), "rank_budget = 0"));
  CHECK(budget(240, 1).empty());
  CHECK(contains(budget(241, 1), "only 240 are allocated"));
  CHECK(contains(budget(240, 5), "layer 'x' has rank 4, min_rank = 5"));
  const auto fraction = [](double f) {
    return error_of([&] { ctrlora::budget_from_fraction(kThree, f, {}); });
  };
  CHECK(contains(fraction(1.5), "rank_budget = 1.5"));
  CHECK(contains(fraction(0.0), "fraction in (0, 1]"));
  CHECK(contains(fraction(std::numeric_limits<double>::quiet_NaN()), "fraction in (0, 1]"));
  CHECK(contains(fraction(0.1), "rank_budget = 24 parameters"));
  CHECK(ctrlora::budget_from_fraction(kThree, 0.5, {}) == 120);
  CHECK(contains(error_of([] { ctrlora::check_budget({}, 1, {}); }), "expected layers; got none"));
}

TEST_CASE("allocation: greedy by utility per parameter, exactly within the budget") {
  // Utility 4 in z is worth as much per parameter as 1 in x and y.
  const Utilities utilities = {{9, 3, 2, 1}, {8, .5}, {44, 9, 1, 1}};
  CHECK(allocate_ranks(kThree, utilities, 60, {}) == Ranks{1, 1, 1});
  CHECK(allocate_ranks(kThree, utilities, 79, {}) == Ranks{2, 1, 1});
  CHECK(allocate_ranks(kThree, utilities, 120, {}) == Ranks{3, 1, 2});
  CHECK(allocate_ranks(kThree, utilities, 80, {.min_rank = 0}) == Ranks{3, 1, 1});
  CHECK(allocate_ranks(kThree, {{1, 3, 9, 2}, {.5, 8}, {1, 44, 1, 9}}, 120, {}) == Ranks{3, 1, 2});
}

TEST_CASE("allocation: equal utilities go round, first layers first; a NaN counts as nothing") {
  CHECK(allocate_ranks(kThree, {{}, {}, {}}, 90, {}) == Ranks{3, 2, 1});
  CHECK(allocate_ranks(kThree, {{}, {}, {}}, 120, {}) == Ranks{2, 2, 2});
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(allocate_ranks(kThree, {{nan, nan}, {2, 1}, {}}, 70, {}) == Ranks{1, 2, 1});
}

TEST_CASE("allocation: of more utilities than directions the best count, wherever they stand") {
  const std::vector<RankLayer> layers = {{"a", 5, 5, 1}, {"b", 5, 5, 1}};
  CHECK(ctrlora::allocate_ranks(layers, {{1.0, 9.0}, {2.0}}, 10, {.min_rank = 0}) == Ranks{1, 0});
}

TEST_CASE("plan: nothing happens without a reason") {
  const std::vector<LayerPlan> plan =
      plan_ranks(kThree, {{{3, 1}, {}}, {{2}, {0, -1}}, {{5}, {}}}, 100, {});
  CHECK(ranks_of(plan) == Ranks{2, 1, 1});
  CHECK(std::all_of(plan.begin(), plan.end(), still));
}

TEST_CASE("plan: over the budget the least useful per parameter go, by index") {
  const std::vector<LayerPlan> plan =
      plan_ranks(kThree, {{{1, 9, 2}, {}}, {{2, 7}, {}}, {{3, 12}, {}}}, 100, {});
  CHECK(ranks_of(plan) == Ranks{3, 2, 1});  // 3/40 is less than 1/10
  CHECK(plan[2].dropped == Ranks{0});
  const std::vector<LayerPlan> less =
      plan_ranks(kThree, {{{1, 9, 2}, {}}, {{2, 7}, {}}, {{3, 12}, {}}}, 70, {});
  CHECK(ranks_of(less) == Ranks{2, 1, 1});
  CHECK(less[0].dropped == Ranks{0});
  CHECK(less[0].utility == doctest::Approx(-1.0));
}

TEST_CASE("plan: free room is filled by the best, exchanges need the hysteresis") {
  const RankRules rules{.max_move = 1.0};
  // Room for one more in x or y.
  std::vector<LayerPlan> plan =
      plan_ranks(kThree, {{{3}, {1, 2}}, {{2}, {1.5}}, {{50}, {}}}, 70, rules);
  CHECK(ranks_of(plan) == Ranks{2, 1, 1});
  CHECK(plan[0].grown == Ranks{1});
  // No room: 2.4 does not beat 1.25 * 2, 2.6 does.
  plan = plan_ranks(kThree, {{{3}, {2.4}}, {{2, 4}, {}}, {{50}, {}}}, 70, rules);
  CHECK(ranks_of(plan) == Ranks{1, 2, 1});
  plan = plan_ranks(kThree, {{{3}, {2.6}}, {{2, 4}, {}}, {{50}, {}}}, 70, rules);
  CHECK(ranks_of(plan) == Ranks{2, 1, 1});
  CHECK(plan[1].dropped == Ranks{0});
  CHECK(std::count_if(plan.begin(), plan.end(), still) == 1);
  CHECK((plan[0].from == 1 && plan[0].to == 2));
  CHECK(plan[1].utility == doctest::Approx(-2.0));
  plan = plan_ranks(kThree, {{{3}, {2.5}}, {{2, 4}, {}}, {{50}, {}}}, 70, rules);
  CHECK(std::all_of(plan.begin(), plan.end(), still));  // exactly the hysteresis is not above it
  // A NaN keeps its place: nobody knows what it is worth.
  const double nan = std::numeric_limits<double>::quiet_NaN();
  plan = plan_ranks(kThree, {{{3}, {99}}, {{nan, nan}, {nan}}, {{50}, {}}}, 70, rules);
  CHECK(ranks_of(plan) == Ranks{1, 2, 1});
}

TEST_CASE("plan: what is dropped for the budget leaves no room for more; exchanges go on") {
  const std::vector<LayerPlan> plan =
      plan_ranks(kThree, {{{1, 9, 2}, {}}, {{2, 7}, {8}}, {{3, 12}, {}}}, 70, {.max_move = 1.0});
  CHECK(ranks_of(plan) == Ranks{1, 2, 1});
  CHECK(plan[0].dropped == Ranks{0, 2});
  CHECK(plan[1].dropped == Ranks{0});
  CHECK(plan[1].grown == Ranks{0});
}

TEST_CASE("plan: new directions come by utility per parameter") {
  // 3 for 10 parameters before 8 for 40; there is room for one of them.
  const std::vector<LayerPlan> plan =
      plan_ranks(kThree, {{{50}, {3}}, {{50}, {}}, {{50}, {8}}}, 100, {.max_move = 1.0});
  CHECK(ranks_of(plan) == Ranks{2, 1, 1});
}

TEST_CASE("plan: equally weak directions go from where more are left, then from the last layer") {
  const std::vector<RankLayer> layers = {{"a", 5, 5, 4}, {"b", 5, 5, 4}, {"c", 5, 5, 4}};
  const auto after = [&](const std::vector<double>& a, const std::vector<double>& b) {
    const auto used = static_cast<int64_t>(10 * (a.size() + b.size() + 1));
    return ranks_of(
        plan_ranks(layers, {{a, {}}, {b, {}}, {{9}, {9}}}, used, {.min_rank = 0, .max_move = 0.3}));
  };
  CHECK(after({2}, {2, 2}) == Ranks{1, 1, 2});
  CHECK(after({2, 2}, {2}) == Ranks{1, 1, 2});
  CHECK(after({2}, {2}) == Ranks{1, 0, 2});
  CHECK(after({1}, {2, 2}) == Ranks{0, 2, 2});
}

TEST_CASE("plan: a wide layer's direction takes the room of several, and only if it beats all") {
  const RankRules rules{.max_move = 1.0};
  const std::vector<double> four = {2, 2, 2, 2};
  std::vector<LayerPlan> plan =
      plan_ranks(kThree, {{four, {}}, {{2, 2}, {}}, {{50}, {9.9}}}, 100, rules);
  CHECK(ranks_of(plan) == Ranks{4, 2, 1});
  plan = plan_ranks(kThree, {{four, {}}, {{2, 2}, {}}, {{50}, {10.1}}}, 100, rules);
  CHECK(ranks_of(plan) == Ranks{1, 1, 2});
}

TEST_CASE("plan: a full layer replaces its own; min_rank holds") {
  const RankRules rules{.max_move = 1.0};
  std::vector<LayerPlan> plan =
      plan_ranks(kThree, {{{5, 1, 3, 4}, {2, 2}}, {{2}, {}}, {{9}, {}}}, 240, rules);
  CHECK(ranks_of(plan) == Ranks{4, 1, 1});
  CHECK(plan[0].dropped == Ranks{1});
  CHECK(plan[0].grown == Ranks{0});
  CHECK(std::count_if(plan.begin(), plan.end(), still) == 2);
  // The last that a layer may hold is not one too many: the weakest goes, wherever it is.
  plan = plan_ranks(kThree, {{{5, 5, 5}, {8}}, {{1, .1}, {}}, {{50}, {}}}, 90, rules);
  CHECK(ranks_of(plan) == Ranks{4, 1, 1});
  CHECK(plan[1].dropped == Ranks{1});
  plan = plan_ranks(kThree, {{{5}, {8, 8, 8}}, {{.1}, {}}, {{.1}, {}}}, 60, rules);
  CHECK(ranks_of(plan) == Ranks{1, 1, 1});  // x replaces its own; y and z keep their last one
  CHECK(plan[0].dropped == Ranks{0});
  plan = plan_ranks(kThree, {{{5}, {8, 8, 8}}, {{.1}, {}}, {{.1}, {}}}, 60,
                    {.min_rank = 0, .max_move = 1.0});
  CHECK(ranks_of(plan) == Ranks{4, 1, 0});
}

TEST_CASE("plan: at most max_move moves, one always may") {
  const std::vector<RankLayer> wide = {{"x", 5, 5, 40}, {"y", 5, 5, 40}};
  const std::vector<double> low(30, 1.0), high(10, 9.0);
  const RankRules tenth{.min_rank = 0, .max_move = 0.1};
  CHECK(ranks_of(plan_ranks(wide, {{low, {}}, {{}, high}}, 300, tenth)) == Ranks{27, 3});
  CHECK(ranks_of(plan_ranks(wide, {{{1, 1}, {}}, {{}, high}}, 20, tenth)) == Ranks{1, 1});
  CHECK(ranks_of(plan_ranks(wide, {{low, {}}, {{}, high}}, 400, tenth)) == Ranks{30, 3});
}

TEST_CASE("plan: wrong sizes are named") {
  CHECK(contains(error_of([] { plan_ranks(kThree, {}, 100, {}); }), "each of 3 layers; got 0"));
  CHECK(contains(error_of([] { plan_ranks(kThree, {{{1, 1, 1, 1, 1}, {}}, {}, {}}, 100, {}); }),
                 "layer 'x' has 5 utilities"));
  CHECK(contains(error_of([] { allocate_ranks(kThree, {}, 100, {}); }), "each of 3 layers; got 0"));
  CHECK(contains(error_of([] { used_parameters(kThree, {1}); }), "each of 3 layers; got 1"));
}
