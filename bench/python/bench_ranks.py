"""What the rank scheduler costs: whole trainings with `rank_budget` beside the same without.

    python bench/python/bench_ranks.py [--jobs minilm demo] [--steps 60] [--out FILE]

Trainings of up to 400 steps have an event every 8 steps, and every step between two gathers what
the next one decides by; longer ones have fewer, so this is the most they can cost. Both runs take
every step in turn, on one thread, in CPU time of the process: "training" is the ratio of all steps'
time, events included; "between_events" the median of the ratios of steps without an event, "event"
the median of those with one. Shapes stay, so smaller ranks save nothing here.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from common import interleaved, ratios, record
from jobs import MODELS, TrainingRun, batch_of
from quality_tasks import CausalLM, LanguageModelling

import pyctrlora
from pyctrlora.demo.model import GPT, GPTConfig

JOBS = [*MODELS, "demo"]
Job = tuple[torch.nn.Module, dict[str, torch.Tensor]]


def make(job: str) -> Job:
    """A model with adapters, and its only batch; "demo" is the demo's GPT, untrained."""
    if job != "demo":
        return MODELS[job](), batch_of(job)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LanguageModelling.targets)
    base = GPTConfig()
    tokens = torch.randint(0, base.vocabulary, (8, base.context + 1))
    return get_peft_model(CausalLM(GPT(base)), config), {"input_ids": tokens}


def bench(job: str, steps: int) -> dict[str, Any]:
    """Both trainings of one job."""
    runs: dict[str, TrainingRun] = {}
    for name, options in (("ctr", {}), ("budget", {"rank_budget": 0.5, "total_steps": steps})):
        model, batch = make(job)
        optimizer = pyctrlora.CTROptimizer.from_model(model, lr=0.01, **options)
        runs[name] = TrainingRun(model, optimizer, batch)
    seconds = interleaved(runs, steps, warm_up=0)
    # Made in the call of step() that makes their number whole; the first entry is the start.
    events = {made - 1 for made in runs["budget"].optimizer.report()["history"]["steps"][1:]}
    each = [a / b for a, b in zip(seconds["budget"], seconds["ctr"], strict=True)]
    return {
        "training": ratios(seconds, "budget", "ctr")["mean"],
        "between_events": statistics.median(r for n, r in enumerate(each) if n not in events),
        "event": statistics.median(each[number] for number in events),
        "events": len(events),
        "steps": steps,
        "targets": {"training": 1.02},
    }


def main() -> None:
    """Runs the jobs and writes bench/results/ranks.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=["minilm", "demo"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record("ranks", {job: bench(job, options.steps) for job in options.jobs}, options.out)


if __name__ == "__main__":
    main()
