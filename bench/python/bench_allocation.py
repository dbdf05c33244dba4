"""Whether other ranks under the same budget would do better than those that `rank_budget` finds.

    python bench/python/bench_allocation.py [--seeds 0 1] [--lr 0.32] [--search 2] [--out FILE]

GSM8K's text with the demo's GPT, as bench_quality.py has it. A training with rank_budget=0.5 gives
the ranks. They are then held from the first step on, as they are and with one group of layers
changed at a time. "per_tenth" is what a change does to the mean loss for each tenth of all
allocated parameters that it adds or takes: where groups differ much, moving parameters between them
would pay, and a group that cannot grow is at the rank it was allocated.

With --search, as many rounds of a local search on the loss itself, which no rule has at hand: a
round takes one rank from every layer of one group, gives what that frees to another, tries all such
pairs of groups and goes on from the best one if it is better. As the best of many it looks a little
better than it is; so it is run once more, beside the ranks found, on a seed of its own.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import re
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import peft
from bench_quality import RANK, ROOT, run
from common import record
from quality_methods import METHODS, ctr, make_model
from quality_tasks import make_task

Ranks = dict[str, int]  # by layer

# A group of layers by name, and what is added to their ranks.
CHANGES: dict[str, tuple[str, int]] = {
    "as found": ("", 0),
    "first layer, q k o": (r"\.0\..*[qko]_proj", -4),
    "first layer, up down": (r"\.0\..*(up|down)_proj", -3),
    "first layer, v": (r"\.0\..*v_proj", 7),
    "later layers, q k v": (r"\.[1-9]\..*[qkv]_proj", 2),
    "later layers, o": (r"\.[1-9]\..*o_proj", 3),
    "later layers, up": (r"\.[1-9]\..*up_proj", 2),
    "later layers, down": (r"\.[1-9]\..*down_proj", 2),
    "later layers, down less": (r"\.[1-9]\..*down_proj", -3),
}
# Each group once.
GROUPS = {name: pattern for name, (pattern, by) in CHANGES.items() if by and "less" not in name}


def changed(ranks: Ranks, pattern: str, by: int) -> Ranks:
    """The ranks with a group's moved, none below 1 nor above what is allocated."""
    return {
        name: min(RANK, max(1, rank + by)) if pattern and re.search(pattern, name) else rank
        for name, rank in ranks.items()
    }


def costs(data: Path) -> dict[str, int]:
    """Parameters of one direction of each layer."""
    model = make_model(make_task("gsm8k", data), METHODS["ctr_half"], 0, RANK, 1)
    return {
        name: layer.in_features + layer.out_features
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }


def fixed(config: dict[str, Any], data: str, ranks: Ranks) -> float:
    """Loss of a training whose layers have these ranks throughout. In a worker process."""
    # PEFT looks for names within the base model.
    own = {re.escape(name.removeprefix("base_model.model.")): rank for name, rank in ranks.items()}
    scaled = {name: 2 * rank for name, rank in own.items()}
    METHODS["fixed"] = ctr("ranks held", config=(("rank_pattern", own), ("alpha_pattern", scaled)))
    return float(run({**config, "method": "fixed"}, data)["loss"])


def rows(
    asked: dict[str, Ranks], ends: dict[str, list[float]], cost: dict[str, int]
) -> dict[str, Any]:
    """What each change does to the loss, for as much as it adds or takes."""
    out: dict[str, Any] = {}
    for name, ranks in asked.items():
        used = sum(cost[layer] * rank for layer, rank in ranks.items())
        share = used / (RANK * sum(cost.values()))
        own = {"share": share, "losses": ends[name], "loss": statistics.mean(ends[name])}
        found = out.get("as found", own)
        if share != found["share"]:
            gain = own["loss"] - found["loss"]
            own["per_tenth"] = 0.1 * gain / (share - found["share"])
        out[name] = own
    return out


def moved(ranks: Ranks, cost: dict[str, int], giver: str, taker: str) -> Ranks | None:
    """One rank less in each layer of a group, and what that frees to another's, smallest first."""
    own, free = dict(ranks), 0
    for name in ranks:
        if re.search(GROUPS[giver], name) and own[name] > 1:
            own[name] -= 1
            free += cost[name]
    takers = [name for name in ranks if re.search(GROUPS[taker], name)]
    given = 0
    while True:
        fitting = [name for name in takers if own[name] < RANK and cost[name] <= free]
        if not fitting:
            return own if given else None
        smallest = min(fitting, key=lambda name: own[name])
        own[smallest] += 1
        free -= cost[smallest]
        given += 1


Evaluate = Callable[[dict[str, Ranks], list[int]], dict[str, list[float]]]


def search(
    found: Ranks, cost: dict[str, int], rounds: int, seeds: list[int], losses: Evaluate
) -> dict[str, Any]:
    """The best ranks of as many parameters, by trial."""
    best, taken, tried = found, [], 0
    at = statistics.mean(losses({"found": found}, seeds)["found"])
    for _ in range(rounds):
        pairs = {
            f"{a} -> {b}": moved(best, cost, a, b) for a, b in itertools.permutations(GROUPS, 2)
        }
        possible = {name: ranks for name, ranks in pairs.items() if ranks is not None}
        means = {name: statistics.mean(own) for name, own in losses(possible, seeds).items()}
        tried += len(means)
        name = min(means, key=lambda name: means[name])
        if means[name] >= at:
            break
        best, at = possible[name], means[name]
        taken.append({"move": name, "loss": at})
    unseen = [max(seeds) + 1]
    ends = losses({"found": found, "searched": best}, unseen)
    return {"tried": tried, "taken": taken, "ranks": best, "unseen": {"seeds": unseen, **ends}}


def main() -> None:
    """Writes bench/results/allocation.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--lr", type=float, default=0.32)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--search", type=int, default=0, help="rounds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context) as pool:
        data = str(options.data)
        base = {"task": "gsm8k", "lr": options.lr, "steps": options.steps}
        each = [{**base, "seed": seed} for seed in options.seeds]
        jobs = [pool.submit(run, {**config, "method": "ctr_half"}, data) for config in each]
        trained = [job.result() for job in jobs]
        found, cost = trained[0]["ranks"], costs(options.data)
        asked = {name: changed(found, *change) for name, change in CHANGES.items()}

        def losses(many: dict[str, Ranks], seeds: list[int]) -> dict[str, list[float]]:
            jobs = {
                name: [pool.submit(fixed, {**base, "seed": seed}, data, ranks) for seed in seeds]
                for name, ranks in many.items()
            }
            ends = {}
            for name, own in jobs.items():
                ends[name] = [job.result() for job in own]
                print(f"{name}: {statistics.mean(ends[name]):.4f}", flush=True)
            return ends

        ends = losses(asked, options.seeds)
        searched = {}
        if options.search:
            searched = search(found, cost, options.search, options.seeds, losses)
    found_by = {"losses": [result["loss"] for result in trained], "ranks": found}
    held = rows(asked, ends, cost)
    result = {"seeds": options.seeds, "moved": found_by, "held": held, "searched": searched}
    record("allocation", {**base, **result}, options.out, quiet=True)


if __name__ == "__main__":
    main()
