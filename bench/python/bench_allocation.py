"""Whether other ranks under the same budget would do better than those that `rank_budget` finds.

    python bench/python/bench_allocation.py [--seeds 0 1] [--lr 0.32] [--out FILE]

GSM8K's text with the demo's GPT, as bench_quality.py has it. A training with rank_budget=0.5 gives
the ranks. They are then held from the first step on, as they are and with one group of layers
changed at a time. "per_tenth" is what a change does to the mean loss for each tenth of all
allocated parameters that it adds or takes: where groups differ much, moving parameters between them
would pay, and a group that cannot grow is at the rank it was allocated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import peft
from bench_quality import RANK, ROOT, run
from common import record
from quality_methods import METHODS, ctr, make_model
from quality_tasks import make_task

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


def changed(ranks: dict[str, int], pattern: str, by: int) -> dict[str, int]:
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


def fixed(config: dict[str, Any], data: str, ranks: dict[str, int]) -> float:
    """Loss of a training whose layers have these ranks throughout. In a worker process."""
    # PEFT looks for names within the base model.
    own = {re.escape(name.removeprefix("base_model.model.")): rank for name, rank in ranks.items()}
    scaled = {name: 2 * rank for name, rank in own.items()}
    METHODS["fixed"] = ctr("ranks held", config=(("rank_pattern", own), ("alpha_pattern", scaled)))
    return float(run({**config, "method": "fixed"}, data)["loss"])


def main() -> None:
    """Writes bench/results/allocation.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--lr", type=float, default=0.32)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context) as pool:
        data = str(options.data)
        base = {"task": "gsm8k", "lr": options.lr, "steps": options.steps}
        each = [{**base, "seed": seed} for seed in options.seeds]
        jobs = [pool.submit(run, {**config, "method": "ctr_half"}, data) for config in each]
        moved = [job.result() for job in jobs]
        found, cost = moved[0]["ranks"], costs(options.data)
        asked = {name: changed(found, *change) for name, change in CHANGES.items()}
        runs = {
            name: [pool.submit(fixed, config, data, ranks) for config in each]
            for name, ranks in asked.items()
        }
        whole = RANK * sum(cost.values())
        rows: dict[str, Any] = {}
        for name, ranks in asked.items():
            losses = [job.result() for job in runs[name]]
            share = sum(cost[layer] * rank for layer, rank in ranks.items()) / whole
            rows[name] = {"share": share, "losses": losses, "loss": statistics.mean(losses)}
            added = share - rows["as found"]["share"]
            if added:
                gain = rows[name]["loss"] - rows["as found"]["loss"]
                rows[name]["per_tenth"] = 0.1 * gain / added
            print(name, rows[name], flush=True)
    found_by = {"losses": [result["loss"] for result in moved], "ranks": found}
    result = {**base, "seeds": options.seeds, "moved": found_by, "held": rows}
    record("allocation", result, options.out, quiet=True)


if __name__ == "__main__":
    main()
