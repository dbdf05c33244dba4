"""What `step()` must move and compute, beside what this machine can, and what an H100 would need.

    python bench/python/bench_roofline.py [--rounds 48] [--threads 1] [--out FILE]

Counted per pair: passes over (m + n)·r numbers (k = r; `cpp/README.md`, section 8 says which) and
flops of the d-wide products. Measured: bandwidth of x += y and GEMM speed (limits: the best of
some), the step itself ("plain": nothing observed; "thirds": factor_every 3), and its spread, in CPU
time on one thread.
Predicted for an H100: traffic at its memory's 3.35 TB/s times the share of bandwidth that a pass of
small kernels reaches, set by `--share`; launches are counted, not timed.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from bench_step import launches
from common import interleaved, quantile, record
from jobs import SCHEDULES, SHAPES, make_pairs, observing, tensors

# Reads and writes of a pair's (m + n)·r numbers. Ours: momentum 3, Grams 3, update 4, and an eighth
# of the Grams measured anew (W, U).
PASSES = {"adamw": 7.0, "plain": 10.25}
# More for an observed layer: Y gathered 2, checked 1 and scaled 2; joint Gram 2; Y and U combined
# 3; its Gram with U 2; the new basis 3; Grams with it 2. For one whose raw direction is measured:
# the gradient stacked 2 and multiplied 3.
OBSERVED, SIZED = 5 + 10 + 2, 5
FLOPS = 12.5  # times r²·(m + n): 3 Grams and 3 terms of the update, 2 r² each, and the eighth
OBSERVED_FLOPS, SIZED_FLOPS = 22, 6  # 3, 2 terms, 2, 2 terms of the refresh, 2 Grams; 3 Grams
SHARE = {"adamw": 0.0, "plain": 0.0, "thirds": 1 / 3, "default": 1.0}  # of the layers observed
SIZED_SHARE = {"adamw": 0.0, "plain": 0.0, "thirds": 1 / 3, "default": 1 / 3}

# Linears of a decoder layer as (m, n), and layers: Llama 2's 7B and 70B (GQA of 8 heads of 128).
MODELS = {
    "7B": ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], 32),
    "70B": (
        [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192)]
        + [(28672, 8192)] * 2
        + [(8192, 28672)],
        80,
    ),
}
H100 = {"bytes_per_second": 3.35e12, "flops_float32": 67e12, "flops_bfloat16": 989e12}


def machine_limits(rounds: int) -> dict[str, float]:
    """Bandwidth in bytes/s of x += y, whose two reads and a write are a step's mix, and flops/s."""
    source, target = torch.randn(2**26), torch.zeros(2**26)
    x, y, z = (torch.randn(1536, 1536) for _ in range(3))
    seconds = interleaved(
        {"add": lambda: target.add_(source), "gemm": lambda: torch.mm(x, y, out=z)}, rounds
    )
    return {
        "bytes_per_second": 3 * source.nbytes / min(seconds["add"]),
        "flops": 2 * 1536**3 / min(seconds["gemm"]),
    }


def work(shapes: Any, rank: int, kind: str, width: int = 4) -> dict[str, float]:
    """Bytes and flops of one step over (m, n, count)."""
    size = sum((m + n) * count for m, n, count in shapes)
    passes = PASSES["adamw" if kind == "adamw" else "plain"]
    passes += OBSERVED * SHARE[kind] + SIZED * SIZED_SHARE[kind]
    flops = 0.0 if kind == "adamw" else FLOPS
    flops += OBSERVED_FLOPS * SHARE[kind] + SIZED_FLOPS * SIZED_SHARE[kind]
    return {"bytes": passes * size * rank * width, "flops": flops * rank**2 * size}


def measured(rounds: int) -> dict[str, Any]:
    """Seconds of each kind of step, and their spread."""
    runs, prepare = {}, {}
    adamw = torch.optim.AdamW(tensors(make_pairs()), lr=1e-4, fused=True)
    runs["adamw"] = adamw.step
    for name, every in SCHEDULES.items():
        optimizer, prepare[name] = observing(SHAPES, factor_every=every)
        runs[name] = optimizer.step
    seconds = interleaved(runs, rounds, warm_up=3, prepare=prepare)
    return {
        name: {
            "median": statistics.median(each),
            "p95_over_median": quantile(each, 0.95) / statistics.median(each),
        }
        for name, each in seconds.items()
    }


def on_h100(name: str, rank: int, share: float) -> dict[str, float]:
    """One step of a whole model's adapters, and its place in a training step of 16k tokens."""
    linears, layers = MODELS[name]
    shapes = [(m, n, layers) for m, n in linears]
    parameters = sum(m * n for m, n in linears) * layers
    job = work(shapes, rank, "default")
    adamw = work(shapes, rank, "adamw")
    traffic = job["bytes"] / (H100["bytes_per_second"] * share)
    products = job["flops"] / (H100["flops_float32"] * share)
    # Forward and the backward of the inputs: 4 flops a parameter and token (the base is frozen).
    training = 4 * parameters * 16384 / (H100["flops_bfloat16"] * 0.4)
    return {
        "milliseconds": 1e3 * (traffic + products),
        "traffic_milliseconds": 1e3 * traffic,
        "adamw_milliseconds": 1e3 * adamw["bytes"] / (H100["bytes_per_second"] * share),
        "gigabytes": job["bytes"] / 1e9,
        "gigaflops": job["flops"] / 1e9,
        "share_of_training_step": (traffic + products) / training,
    }


def table(result: dict[str, Any]) -> list[str]:
    """Limits, shares of them, and the predictions."""
    limits = result["limits"]
    speeds = (limits["bytes_per_second"] / 1e9, limits["flops"] / 1e9)
    lines = ["x += y {:.1f} GB/s, GEMM {:.0f} GFLOP/s".format(*speeds)]
    lines.append(
        f"{'step':8} {'ms':>8} {'p95/med':>8} {'MB':>8} {'GFLOP':>8} {'bound ms':>9} {'of it':>8}"
    )
    for name, found in result["steps"].items():
        lines.append(
            f"{name:8} {1e3 * found['median']:8.2f} {found['p95_over_median']:8.2f} "
            f"{found['bytes'] / 1e6:8.0f} {found['flops'] / 1e9:8.2f} "
            f"{1e3 * found['bound']:9.2f} {found['bound'] / found['median']:8.2f}"
        )
    lines.append(f"{'H100':14} {'ms':>8} {'AdamW ms':>9} {'GB':>8} {'GFLOP':>8} {'of a step':>10}")
    for name, found in result["h100"].items():
        lines.append(
            f"{name:14} {found['milliseconds']:8.3f} {found['adamw_milliseconds']:9.3f} "
            f"{found['gigabytes']:8.2f} {found['gigaflops']:8.1f} "
            f"{100 * found['share_of_training_step']:9.3f}%"
        )
    return lines


def main() -> None:
    """Measures, predicts, and writes bench/results/roofline.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.6, help="of the H100's limits")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    limits, steps = machine_limits(8), measured(options.rounds)
    for name, found in steps.items():
        found.update(work(SHAPES, 16, name))
        found["bound"] = (
            found["bytes"] / limits["bytes_per_second"] + found["flops"] / limits["flops"]
        )
    result = {
        "limits": limits,
        "steps": steps,
        "launches": launches(),
        "share": options.share,
        "h100": {
            f"{name} r={rank}": on_h100(name, rank, options.share)
            for name in MODELS
            for rank in (16, 64)
        },
    }
    record("roofline", result, options.out, quiet=True)
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
