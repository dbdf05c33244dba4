"""What each default is worth on the demo's job: validation loss with one thing changed at a time.

    python bench/python/bench_ablation.py [--seeds 0 1 2] [--steps 72] [--out FILE]

72 steps are 0.6 of those of `bench_convergence.py`, which has AdamW's best final losses for the
same seeds. Ranks are compared over the whole 120 steps. Losses do not depend on the machine's load.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any

from common import record
from jobs import demo_base

import pyctrlora
from pyctrlora.demo.data import batches
from pyctrlora.demo.job import gpt_job
from pyctrlora.demo.pretrain import token_loss
from pyctrlora.demo.train import CTR, Settings, fine_tune

if TYPE_CHECKING:
    import torch

    from pyctrlora.demo.job import Job

CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.07},
    {"lr": 0.14},
    {"beta1": 0.5},
    {"beta1": 0.8},
    {"factor_every": 2},
    {"factor_every": 3},
    {"factor_every": 12},
    {"factor_beta": 0.0},
    {"factor_beta": 0.3},
    {"factor_beta": 0.8},
    {"factor_beta": 0.95},
    {"whitening": 0.45},
    {"whitening": 0.65},
    {"damping": 0.003},
    {"damping": 0.03},
    {"kl_radius": 0.0025},
    {"kl_radius": 0.01},
    {"kl_radius": math.inf},
    {"rms_beta": 0.8},
    {"rms_beta": 0.95},
    {"sketch_rank": 8},
    {"sketch_rank": 32},
    {"sample_rows": 64},
    {"sample_rows": 1024},
    {"step_length": "radius", "lr": 0.05},
    {"curvature": "gradient"},
    {"whitening": 0.0},
    {"factor_every": 3, "beta1": 0.8},
)
CALIBRATION = 8  # batches before the first step, with the demo's other settings
RANKS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("rank 8", 8, {}),
    ("rank 8, rank_budget 0.5", 8, {"rank_budget": 0.5}),
    ("rank 8, rank_budget 0.5, rank_start full", 8, {"rank_budget": 0.5, "rank_start": "full"}),
    ("rank 4", 4, {}),
)


def losses(job: Job, settings: Settings, seeds: list[int], lr: float) -> dict[str, Any]:
    """Final loss of each seed, and their mean."""
    runs = [
        fine_tune(job, dataclasses.replace(settings, seed=seed), CTR, lr)[0].final_loss
        for seed in seeds
    ]
    return {"mean": statistics.mean(runs), "losses": runs}


def initialised(job: Job, batch: int) -> Job:
    """The same job from `cg_init` on batches of its own."""

    def make(seed: int) -> torch.nn.Module:
        model = job.make(seed)
        data = iter(batches(job.train, job.context, batch, CALIBRATION, seed + 1000))

        def train_step() -> None:
            tokens = next(data)
            token_loss(job.logits(model, tokens[:, :-1]), tokens).backward()

        pyctrlora.cg_init(model, train_step, batches=CALIBRATION, progress=False)
        return model

    return dataclasses.replace(job, make=make)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank-steps", type=int, default=Settings.steps)
    options, base = demo_base(parser, 72)
    job = gpt_job(base, 8)
    result: dict[str, Any] = {"steps": options.steps, "seeds": options.seeds, "changes": {}}

    def note(part: str, name: str, value: dict[str, Any]) -> None:
        result[part][name] = value
        print(f"{name}: {value['mean']:.4f}", flush=True)

    short = Settings(steps=options.steps, evaluations=1)
    for change in CHANGES:
        own = {key: value for key, value in change.items() if key != "lr"}
        name = ", ".join(f"{key} {value}" for key, value in change.items()) or "defaults"
        settings = dataclasses.replace(short, options=own)
        note("changes", name, losses(job, settings, options.seeds, change.get("lr", short.lr)))
    start = initialised(job, short.batch)
    note(
        "changes", f"cg_init, {CALIBRATION} batches", losses(start, short, options.seeds, short.lr)
    )
    result["rank_steps"], result["ranks"] = options.rank_steps, {}
    whole = Settings(steps=options.rank_steps, evaluations=1)
    for name, rank, own in RANKS:
        settings = dataclasses.replace(whole, options=own)
        note("ranks", name, losses(gpt_job(base, rank), settings, options.seeds, whole.lr))
    ends = [result["ranks"][name]["mean"] for name in ("rank 4", "rank 8")]
    for name, *_ in RANKS[1:3]:
        closed = (ends[0] - result["ranks"][name]["mean"]) / (ends[0] - ends[1])
        result["ranks"][name]["gap_closed"] = closed
    record("ablation", result, options.out)


if __name__ == "__main__":
    main()
