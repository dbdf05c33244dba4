"""CTROptimizer beside other projects' optimizers, in one process and run.

    python bench/python/bench_peers.py [--short] [--threads 2] [--out FILE]

`step()` alone on two jobs: "large", 56 pairs of a 7B model's shapes, r = 16, and "small", 448 pairs
of 256 x 256, r = 8; gradients are given. "ctr" runs the default schedule (all layers
observed; sketching their rows belongs to backward), "ctr_thirds" observes a third of them
(`factor_every` 3), "ctr_plain" nothing. SOAP keeps two
d x d matrices of every dimension d <= 10000, some 11 GB on "large" and half a minute for the first
decomposition of each: it runs on `--soap-pairs` pairs of each shape and its time is scaled; since
its work comes every tenth step its figures are means over whole periods. heavyball's SOAP leaves
out dimensions above 2048 by its default, so on "large" it preconditions the rank alone.

Whole training steps on the GPT and on MiniLM-L6 of `jobs.py`: PEFT + AdamW(fused), ours attached
only ("ctr"; "thirds" as above; "plain" observes nothing: it is the step alone, and the rest of
"ctr" the observation), ours on fused layers ("fused"), fused and compacted to half the parameters
("compacted"), and PEFT's AdaLoRA, PEFT's Riemannian + AdamW, SINGD (kronecker factors by hooks).
"ctr_bfloat16" keeps its bases in bfloat16. Figures are ratios within one run, all optimizers in
turn, round by round; `bench/table.py` prints them.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from common import interleaved, ratios, record
from jobs import MODELS, SHAPES, SMALL, TrainingRun, state_bytes, training_runs
from peers import contenders, training_peers

import pyctrlora


def bench_steps(job: str, rounds: int, soap_pairs: int, missing: dict[str, str]) -> dict[str, Any]:
    """`step()` of every optimizer on one job."""
    shapes, rank = (SHAPES, 16) if job == "large" else (SMALL, 8)
    all_of_it = shapes[0][2]
    taking_part = contenders(shapes, rank, soap_pairs or all_of_it, missing)
    runs = {c.name: c.optimizer.step for c in taking_part}
    prepare = {c.name: c.prepare for c in taking_part}
    seconds = interleaved(runs, rounds, warm_up=3, prepare=prepare)
    out: dict[str, Any] = {"milliseconds": {}, "ours_over": {}, "over_adamw_fused": {}}
    for c in taking_part:
        each = [s / c.share for s in seconds[c.name]]
        seconds[c.name] = each
        out["milliseconds"][c.name] = {
            "median": 1e3 * statistics.median(each),
            "mean": 1e3 * statistics.mean(each[: len(each) // c.period * c.period or None]),
            "share": c.share,
        }
    for c in taking_part:
        out["over_adamw_fused"][c.name] = ratios(seconds, c.name, "adamw_fused")
        if not c.name.startswith("ctr"):
            out["ours_over"][c.name] = {
                name: ratios(seconds, name, c.name) for name in ("ctr", "ctr_thirds", "ctr_plain")
            }
    fused = next(c for c in taking_part if c.name == "adamw_fused").optimizer
    out["state_over_adamw"] = {
        c.name: state_bytes(c.optimizer) / c.share / state_bytes(fused) for c in taking_part
    }
    return out


def compacted(job: str, batch: dict[str, torch.Tensor]) -> TrainingRun:
    """The fused job with tensors shrunk to half the parameters."""
    model = MODELS[job]()
    pyctrlora.fuse(model)
    optimizer = pyctrlora.CTROptimizer.from_model(
        model, lr=0.01, rank_budget=0.5, rank_start="budget", total_steps=10_000
    )
    run = TrainingRun(model, optimizer, batch)
    run()  # ranks come down after the first step
    pyctrlora.compact(model, optimizer)
    return run


def bench_training(job: str, rounds: int, peers: bool, missing: dict[str, str]) -> dict[str, Any]:
    """Whole training steps of one job."""
    runs = training_runs(job)
    runs["compacted"] = compacted(job, runs["adamw"].batch)
    if peers:
        runs |= training_peers(MODELS[job], runs["adamw"].batch, missing)
    seconds = interleaved(runs, rounds, warm_up=6)  # past the steps that observe every layer
    return {
        "over_adamw": {name: ratios(seconds, name, "adamw") for name in runs if name != "adamw"},
        "compacted_over_fused": ratios(seconds, "compacted", "fused"),
        "fused_over": {
            name: ratios(seconds, "fused", name)
            for name in runs
            if name not in ("fused", "ctr", "thirds", "plain")
        },
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "targets": {"fused": 0.95, "ctr": 1.03, "compacted_over_fused": 0.97},
    }


def main() -> None:
    """Runs the jobs and writes bench/results/peers.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=48, help="of step(), a multiple of 24")
    parser.add_argument("--training-rounds", type=int, default=9)
    parser.add_argument("--soap-pairs", type=int, default=1)
    parser.add_argument("--jobs", nargs="*", default=["large", "small", "gpt", "minilm"])
    parser.add_argument("--short", action="store_true", help="a few minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.short:
        options.rounds, options.training_rounds = 24, 3
    warnings.filterwarnings("ignore", message=".*(pynvml|deprecat).*")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {"step": {}, "training": {}, "missing": {}}
    for job in options.jobs:
        print(f"{job} ...", flush=True)
        if job in MODELS:
            result["training"][job] = bench_training(
                job, options.training_rounds, not options.short, result["missing"]
            )
        else:
            pairs = options.soap_pairs if job == "large" else 0
            result["step"][job] = bench_steps(job, options.rounds, pairs, result["missing"])
    record("peers", result, options.out, quiet=True)


if __name__ == "__main__":
    main()
