"""How the cost of `step()` grows: with width d, rank r, sketch rank k and the number of pairs.

    python bench/python/bench_scaling.py [--rounds 24] [--threads 1] [--out FILE]

One variable at a time, the others as in `BASE`. Time is the mean over the steps of a whole period
of the default schedule (all layers observed, an eighth of the Grams measured anew), CPU time on one
thread; memory is the state's bytes. Exponents are slopes of least squares in log-log;
"tail" is the slope between the two largest values, where fixed costs matter least: a fit over
all of them is flattered by those.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from common import interleaved, record
from jobs import observing, state_bytes

BASE = {"d": 2048, "r": 16, "k": 16, "pairs": 16}
SWEEPS = {
    "d": (512, 1024, 2048, 4096, 8192),
    "r": (4, 8, 16, 32, 64, 128),
    "k": (4, 8, 16, 32, 64, 128),
    "pairs": (8, 16, 32, 64, 128, 256, 448),
}
TARGETS = {"d": 1.10, "pairs": 1.05}
PERIOD = 8  # eighths of the layers
NARROW = 512  # width in the sweep over pairs: 448 of BASE's would not fit a small machine


def exponents(values: tuple[int, ...], costs: list[float]) -> dict[str, float]:
    """Slope of log cost over log value: by least squares, and between the last two."""
    x, y = [math.log(v) for v in values], [math.log(c) for c in costs]
    slope = statistics.linear_regression(x, y).slope
    return {"fit": slope, "tail": (y[-1] - y[-2]) / (x[-1] - x[-2])}


def sweep(name: str, rounds: int) -> dict[str, Any]:
    """Costs along one variable; the values take turns, round by round."""
    runs, prepare, state = {}, {}, []
    for value in SWEEPS[name]:
        size = {**BASE, **({"d": NARROW} if name == "pairs" else {}), name: value}
        shapes = ((size["d"], size["d"], size["pairs"]),)
        optimizer, prepare[str(value)] = observing(shapes, size["r"], sketch_rank=size["k"])
        runs[str(value)] = optimizer.step
        state.append(state_bytes(optimizer))
    seconds = interleaved(runs, rounds, warm_up=3, prepare=prepare)
    mean = [statistics.mean(each) for each in seconds.values()]
    return {
        "values": SWEEPS[name],
        "milliseconds": [1e3 * s for s in mean],
        "state_bytes": state,
        "time_exponent": exponents(SWEEPS[name], mean),
        "memory_exponent": exponents(SWEEPS[name], [float(s) for s in state]),
    }


def table(result: dict[str, Any]) -> list[str]:
    """Exponents, one variable a line."""
    lines = [f"{'exponent in':12} {'time':>7} {'tail':>7} {'memory':>7} {'tail':>7} {'at most':>8}"]
    for name, found in result.items():
        time, memory = found["time_exponent"], found["memory_exponent"]
        numbers = (time["fit"], time["tail"], memory["fit"], memory["tail"])
        aim = f"{TARGETS[name]:8.2f}" if name in TARGETS else ""
        lines.append(f"{name:12} " + " ".join(f"{n:7.3f}" for n in numbers) + f" {aim:>8}")
    return lines


def main() -> None:
    """Runs all sweeps and writes bench/results/scaling.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=PERIOD, help="a multiple of 24")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result = {name: sweep(name, options.rounds) for name in SWEEPS}
    record("scaling", {"base": BASE, "pairs_width": NARROW, "sweeps": result}, options.out, True)
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
