"""Steps to AdamW's best final loss on the demo's job: target 0.6 of AdamW's, three seeds.

    python bench/python/bench_convergence.py [--seeds 0 1 2] [--steps 120] [--out FILE]

A seed sets the adapters' initial values and the batches; the base model is the demo's. AdamW gets
its best learning rate from a sweep for each seed, CTROptimizer keeps its default.
"step_ratio": where CTROptimizer's curve first falls to AdamW's best loss, on the same schedule.
"short_schedules": runs of its own over 0.6 and 0.5 of the steps, the learning rate decayed to 0 by
then.
Losses and steps do not depend on the machine's load; seconds do.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

from common import record
from jobs import demo_base

from pyctrlora.demo.job import Job, gpt_job
from pyctrlora.demo.report import as_json
from pyctrlora.demo.train import CTR, Settings, compare, fine_tune

TARGET = 0.6
SHORT = (0.6, 0.5)  # of AdamW's steps


def brief(run: dict[str, Any]) -> None:
    """Replaces a run's lists of one number a step by their medians."""
    del run["train_losses"]
    for name in ("step_seconds", "optimizer_seconds"):
        run[name] = statistics.median(run[name])


def one_seed(job: Job, settings: Settings) -> dict[str, Any]:
    """The comparison of one seed and the runs over short schedules."""
    print(f"seed {settings.seed}", flush=True)
    result = compare(job, settings)
    goal = result.adamw.final_loss
    content = as_json(job, result)
    del content["machine"]  # record() tells it once
    for run in content["runs"]:
        brief(run)
    print(
        f"  AdamW {goal:.3f} (lr {result.adamw.lr:g}), CTROptimizer {result.ctr.final_loss:.3f}, "
        f"step ratio {result.step_ratio}",
        flush=True,
    )
    content["short_schedules"] = []
    for share in SHORT:
        fewer = dataclasses.replace(settings, steps=round(share * settings.steps))
        loss = fine_tune(job, fewer, CTR, settings.lr)[0].final_loss
        content["short_schedules"].append(
            {"steps": fewer.steps, "final_loss": loss, "reaches": loss <= goal}
        )
        print(f"  {fewer.steps} steps {loss:.3f}", flush=True)
    return content


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=Settings.batch)
    parser.add_argument("--rank", type=int, default=8)
    options, base = demo_base(parser, Settings.steps)
    job = gpt_job(base, options.rank)
    seeds = [
        one_seed(job, Settings(steps=options.steps, batch=options.batch, seed=seed))
        for seed in options.seeds
    ]
    ratios = [seed["step_ratio"] for seed in seeds]
    reached = [ratio for ratio in ratios if ratio is not None]
    summary = {
        "target": TARGET,
        "step_ratios": ratios,
        "worst": max(reached) if len(reached) == len(ratios) else None,
        "median": statistics.median(reached) if reached else None,
        "short_schedules_reach": [
            [short["reaches"] for short in seed["short_schedules"]] for seed in seeds
        ],
        "adamw_final_losses": [seed["adamw_final_loss"] for seed in seeds],
        "ctr_final_losses": [seed["ctr_final_loss"] for seed in seeds],
        "pretraining": {"code_loss": base.code_loss, "seconds": base.seconds},
        "rank": options.rank,
    }
    record("convergence", {"summary": summary, "seeds": seeds}, options.out)


if __name__ == "__main__":
    main()
