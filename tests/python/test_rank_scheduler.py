"""Properties of plans under a budget: any layers, any utilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyctrlora import _C

numbers = st.one_of(
    st.floats(-1, 10), st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf, 1e-300])
)


@st.composite
def problems(draw: Any) -> Any:
    """Layers, utilities of at most the allocated directions, a budget and rules."""
    layers, utilities = [], []
    least = draw(st.integers(0, 2))
    for i in range(draw(st.integers(1, 6))):
        m, n = draw(st.integers(1, 60)), draw(st.integers(1, 60))
        allocated = draw(st.integers(max(1, least), 6))
        layers.append(_C.RankLayer(f"layer{i}", m, n, allocated))
        existing = draw(st.lists(numbers, min_size=least, max_size=allocated))
        utilities.append(_C.RankUtilities(existing, draw(st.lists(numbers, max_size=4))))
    rules = _C.RankRules(least, draw(st.floats(1, 3)), draw(st.floats(0.01, 1)))
    lowest = max(1, sum(least * layer.cost() for layer in layers))
    budget = draw(st.integers(lowest, _C.allocated_parameters(layers)))
    return layers, utilities, budget, rules


def outcome(plan: Any) -> Any:
    return [(p.from_rank, p.to_rank, p.dropped, p.grown) for p in plan]


def density(layer: Any, utility: float) -> float:
    return utility / layer.cost()


@given(problems())
def test_plans_keep_budget_bounds_and_move_limit(problem: Any) -> None:
    layers, utilities, budget, rules = problem
    plan = _C.plan_ranks(layers, utilities, budget, rules)
    ranks = [p.to_rank for p in plan]
    assert _C.used_parameters(layers, ranks) <= budget
    active = sum(len(u.existing) for u in utilities)
    assert sum(len(p.grown) for p in plan) <= max(1, math.floor(rules.max_move * active + 1e-9))
    for layer, own, p in zip(layers, utilities, plan, strict=True):
        assert rules.min_rank <= p.to_rank <= layer.allocated
        assert p.from_rank == len(own.existing)
        assert p.to_rank == p.from_rank - len(p.dropped) + len(p.grown)
        assert p.dropped == sorted(set(p.dropped))
        assert set(p.dropped) <= set(range(p.from_rank))
        assert len(set(p.grown)) == len(p.grown)
        assert all(own.fresh[i] > 0 for i in p.grown)
    assert outcome(_C.plan_ranks(layers, utilities, budget, rules)) == outcome(plan)


@given(problems())
def test_within_the_budget_a_plan_never_loses_utility(problem: Any) -> None:
    layers, utilities, budget, rules = problem
    used = _C.used_parameters(layers, [len(u.existing) for u in utilities])
    plan = _C.plan_ranks(layers, utilities, max(budget, used), rules)
    for own, p in zip(utilities, plan, strict=True):
        assert not any(math.isnan(own.existing[i]) for i in p.dropped)
    won = sum(u.fresh[i] for u, p in zip(utilities, plan, strict=True) for i in p.grown)
    lost = sum(
        max(0.0, u.existing[i]) for u, p in zip(utilities, plan, strict=True) for i in p.dropped
    )
    assert won >= lost
    if not any(p.grown for p in plan):
        assert not any(p.dropped for p in plan)


@given(problems())
def test_allocations_are_greedy(problem: Any) -> None:
    layers, utilities, budget, rules = problem
    lists = [own.existing + own.fresh for own in utilities]
    ranks = _C.allocate_ranks(layers, lists, budget, rules)
    left = budget - _C.used_parameters(layers, ranks)
    assert left >= 0
    padded = []
    for own, layer in zip(lists, layers, strict=True):
        full = [0.0 if math.isnan(u) else u for u in own] + [0.0] * (layer.allocated - len(own))
        padded.append(sorted(full, reverse=True))
    for i, (layer, rank) in enumerate(zip(layers, ranks, strict=True)):
        assert rules.min_rank <= rank <= layer.allocated
        if rank == layer.allocated:
            continue
        assert layer.cost() > left  # nothing more fits
        refused = density(layer, padded[i][rank])
        for j, (other, kept) in enumerate(zip(layers, ranks, strict=True)):
            # Same cost: nothing taken was worth less than what was refused.
            if other.cost() == layer.cost() and kept > rules.min_rank:
                assert density(other, padded[j][kept - 1]) >= refused


@given(st.integers(1, 3000), st.integers(1, 80), st.booleans())
def test_schedules_are_consistent(total: int, min_steps: int, descend: bool) -> None:
    schedule = _C.RankSchedule(total, min_steps=min_steps, descend=descend)
    due = [t for t in range(total + 1) if schedule.due(t)]
    assert due == list(
        range(schedule.first_event(), schedule.last_event() + 1, schedule.interval())
    )
    assert all(0.05 * total - 1 <= t <= 0.9 * total + 1 for t in due)
    if descend and due:
        allowed = [schedule.budget_at(t, 100, 900) for t in range(total + 1)]
        assert allowed == sorted(allowed, reverse=True)
        assert set(allowed[: due[0]]) == {900}
        assert set(allowed[due[-1] :]) == {100}


@pytest.mark.parametrize("budget", [1.0, "100", None])
def test_a_budget_is_a_whole_number(budget: Any) -> None:
    layers = [_C.RankLayer("x", 4, 4, 2)]
    with pytest.raises(TypeError):
        _C.check_budget(layers, budget, _C.RankRules())
