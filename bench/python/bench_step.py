"""The optimizer's step beside AdamW's, and the whole training step beside PEFT + AdamW.

    python bench/python/bench_step.py [--rounds 40] [--threads 2] [--device cuda] [--out FILE]

`step()` alone: 56 pairs of a 7B model's shapes, r = k = 16, gradients given. "plain" is a step on
which nothing was observed; "default" observes all layers before each step, "thirds" a third of them
(`factor_every` 3). The sketching of rows belongs to backward: it is timed in the training step.
Training step: a GPT of width 512 with 8 layers, PEFT's LoRA r = 8 on all linears, 16 x 128 tokens;
"ctr" with attach(), "thirds" with `factor_every` 3 too, "fused" with fuse(), "peak" the most memory
that tensors take within a step, of weights, optimizer and activations together.
Figures are medians of ratios within one run; absolute times of a shared machine mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from common import interleaved, ratios, record
from jobs import (
    SCHEDULES,
    SHAPES,
    Shapes,
    make_pairs,
    observing,
    state_bytes,
    tensors,
    training_runs,
)
from torch.profiler import ProfilerActivity, profile

RANK = 16


# Run no kernel of their own: views and allocations.
NO_KERNEL = {
    "aten::alias",
    "aten::as_strided",
    "aten::contiguous",
    "aten::detach",
    "aten::diagonal",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::expand",
    "aten::expand_as",
    "aten::flatten",
    "aten::lift_fresh",
    "aten::mT",
    "aten::narrow",
    "aten::permute",
    "aten::reshape",
    "aten::resize_",
    "aten::result_type",
    "aten::select",
    "aten::slice",
    "aten::squeeze",
    "aten::t",
    "aten::to",
    "aten::transpose",
    "aten::unsqueeze",
    "aten::view",
}


def kernels(shapes: Shapes, **options: Any) -> int:
    """Operators of one step on such pairs that run a kernel: on a device, launches."""
    optimizer, prepare = observing(shapes, RANK, **options)
    prepare()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        optimizer.step()
    events = [e for e in trace.events() if e.name.startswith("aten::")]
    return sum(not e.cpu_children and e.name not in NO_KERNEL for e in events)


def launches() -> dict[str, int]:
    """By schedule, number of shapes and of layers of each shape."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on a device: more threads decide in parts
    found = {}
    for name, every in SCHEDULES.items():
        for shapes in (((64, 64, 4),), ((64, 64, 64),), ((64, 64, 4), (128, 64, 4), (64, 128, 4))):
            key = f"{name}, shapes {len(shapes)}, layers {sum(count for _, _, count in shapes)}"
            found[key] = kernels(shapes, factor_every=every)
    torch.set_num_threads(threads)
    return found


def bench_step(rounds: int) -> dict[str, Any]:
    """`step()` alone beside torch's AdamW(fused)."""
    adamw = torch.optim.AdamW(tensors(make_pairs()), lr=1e-3, fused=True)
    for parameter in adamw.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    runs, prepare = {"adamw": adamw.step}, {}
    for name, every in SCHEDULES.items():
        optimizer, prepare[name] = observing(SHAPES, RANK, sketch_rank=RANK, factor_every=every)
        runs[name] = optimizer.step
    seconds = interleaved(runs, rounds, warm_up=0, prepare=prepare)
    # k = r: a basis is as large as its pair.
    basis_bytes = sum(p.nbytes for p in adamw.param_groups[0]["params"])
    return {
        **{f"{name}_to_adamw": ratios(seconds, name, "adamw") for name in prepare},
        "milliseconds": {name: 1e3 * statistics.median(s) for name, s in seconds.items()},
        "state_bytes": optimizer.metrics()["state_bytes"],
        "state_allowed": state_bytes(adamw) + basis_bytes,
        "launches": launches(),
        "targets": {"plain median": 3.0, "plain p95": 4.0},
    }


def bench_training(rounds: int) -> dict[str, Any]:
    """Whole training step beside the same loop with PEFT's own layers and AdamW(fused)."""
    runs = training_runs("gpt")
    seconds = interleaved(runs, rounds, warm_up=6)  # past the steps that observe every layer
    # The profiler tells of a CPU's tensors only.
    measured = runs if torch.get_default_device().type == "cpu" else {}
    peak = {name: run.peak_bytes() for name, run in measured.items()}
    return {
        "ctr_to_adamw": ratios(seconds, "ctr", "adamw"),
        "thirds_to_adamw": ratios(seconds, "thirds", "adamw"),
        "fused_to_adamw": ratios(seconds, "fused", "adamw"),
        "peak_to_adamw": {name: peak[name] / peak["adamw"] for name in peak if name != "adamw"},
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "peak_bytes": peak,
        "targets": {"ctr median": 1.10, "fused median": 0.95, "fused peak": 1.0},
    }


def main() -> None:
    """Runs both and writes bench/results/step.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--training-rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--training-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_default_device(arguments.device)
    torch.manual_seed(0)
    result = {} if arguments.training_only else {"step": bench_step(arguments.rounds)}
    result["device"] = arguments.device
    result["training_step"] = bench_training(arguments.training_rounds)
    record("step", result, arguments.out)


if __name__ == "__main__":
    main()
