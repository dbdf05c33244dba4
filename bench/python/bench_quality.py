"""Quality on real tasks against every LoRA method, each at its own best learning rate.

    python bench/python/bench_quality.py [--tasks gsm8k sst2 cola] [--methods lora ctr ...]
        [--data DIR] [--steps 150] [--workers 2] [--out FILE] [--table]

For each task and method: a sweep of at least four learning rates by factors of two on seed 0,
judged by the loss of a validation split and extended until the best lies inside; the winner on two
more seeds; then 3 and 10 times the winner on seed 0 ("diverged": ends above the loss it began
with). Every run has the same steps, batches and layers and one thread. Runs are kept in FILE as
they end, and a run that is there is not repeated: the bench can be stopped and goes on. --table
only prints.

Columns: score and validation loss, mean and standard deviation over the seeds; loss after a
quarter, half and all of the steps; steps and seconds (CPU time of one thread) to the final loss of
LoRA with AdamW on the same seed, as shares of its own; most memory of the process above what it
held before the model was made; decades of learning rates whose loss is within 2 % of the best (only
tried ones count, so it is a lower bound); how many of the two runs above the best learning rate
diverged.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine
from quality_methods import METHODS, make_model, make_optimizers
from quality_table import table
from quality_tasks import Task, make_task, mean_loss
from torch.optim.lr_scheduler import LambdaLR

from pyctrlora.demo.pretrain import warm_up_and_decay
from pyctrlora.files import replacing

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("gsm8k", "sst2", "cola")
SEEDS = (0, 1, 2)
EVALUATIONS = 8
RANK = 8

Config = dict[str, Any]
tasks = cache(make_task)


def memory(name: str) -> int:
    """VmHWM or VmRSS of this process in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def forget_peak() -> None:
    """VmHWM counts from here, and what runs before have freed is given back (Linux)."""
    gc.collect()
    path = Path("/proc/self/clear_refs")
    if path.exists():
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        path.write_text("5")


def train(task: Task, config: Config) -> dict[str, Any]:
    """One run: what it was and what came out."""
    steps = config["steps"]
    method = METHODS[config["method"]]
    data = task.training(config["seed"], steps)
    forget_peak()
    held = memory("VmRSS")
    began = time.thread_time()
    model = make_model(task, method, config["seed"], RANK, steps)
    opts = make_optimizers(model, method, config["lr"], steps)
    start = time.thread_time() - began
    ramps = [LambdaLR(opt, lambda i: warm_up_and_decay(i, steps)) for opt in opts]
    stops = {steps * i // EVALUATIONS for i in range(1, EVALUATIONS + 1)}
    curve = [[0, start, mean_loss(model, task.validation)]]
    seconds = start
    for number, batch in enumerate(data, start=1):
        began = time.thread_time()
        model(**batch).loss.backward()
        for opt in opts:
            opt.step()
        if method.adapter == "adalora":
            model.base_model.update_and_allocate(number)
        for ramp, opt in zip(ramps, opts, strict=True):
            ramp.step()
            opt.zero_grad()
        seconds += time.thread_time() - began
        if number in stops:
            curve.append([number, seconds, mean_loss(model, task.validation)])
    losses = [point[2] for point in curve]
    found = {"ranks": opts[0].ranks()} if "rank_budget" in dict(method.options) else {}
    return {
        **config,
        **found,
        "curve": [[n, round(s, 3), loss if math.isfinite(loss) else None] for n, s, loss in curve],
        "loss": losses[-1] if math.isfinite(losses[-1]) else None,
        "diverged": not losses[-1] <= losses[0],
        "scores": task.scores(model),
        "peak_bytes": memory("VmHWM") - held,
    }


def run(config: Config, data: str) -> dict[str, Any]:
    """In a worker process, which keeps the tasks it has read."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    return train(tasks(config["task"], Path(data)), config)


class Runs:
    """The runs so far, on disk after each."""

    def __init__(self, path: Path, pool: ProcessPoolExecutor | None, data: Path) -> None:
        self.path, self.pool, self.data = path, pool, data
        self.lock = threading.Lock()
        found = json.loads(path.read_text())["runs"] if path.exists() else []
        self.known = {self.key(run): run for run in found}

    def key(self, config: Config) -> tuple[Any, ...]:
        return tuple(config[name] for name in ("task", "method", "lr", "seed", "steps"))

    def get(self, **config: Any) -> dict[str, Any]:
        if self.key(config) not in self.known:
            assert self.pool is not None
            result = self.pool.submit(run, config, str(self.data)).result()
            with self.lock:
                self.known[self.key(config)] = result
                self.write()
            loss = result["loss"]
            print(
                f"{config['task']} {config['method']} lr {config['lr']:g} seed {config['seed']}: "
                + ("not finite" if loss is None else f"{loss:.4f}"),
                result["scores"],
                flush=True,
            )
        return self.known[self.key(config)]

    def write(self) -> None:
        order = sorted(self.known.values(), key=lambda r: (*map(str, self.key(r)),))
        with replacing(self.path) as new:
            head = {"bench": "quality", "machine": machine(), "rank": RANK}
            rows = ",\n".join(json.dumps(run) for run in order)  # a line a run: readable diffs
            new.write_text(f'{json.dumps(head)[:-1]}, "runs": [\n{rows}\n]}}\n')


def loss_of(result: dict[str, Any]) -> float:
    return math.inf if result["loss"] is None else float(result["loss"])


def unit(runs: Runs, task: str, name: str, steps: int) -> None:
    """All runs of one method on one task."""
    method = METHODS[name]
    lrs = sorted(method.lrs or (lr * method.lr_scale for lr in tasks(task, runs.data).lrs))

    def at(lr: float, seed: int = 0) -> float:
        return loss_of(runs.get(task=task, method=name, lr=lr, seed=seed, steps=steps))

    losses = {lr: at(lr) for lr in lrs}
    for _ in range(6):
        best = min(losses, key=lambda lr: losses[lr])
        if best == min(losses):
            losses[best / 2] = at(best / 2)
        elif best == max(losses):
            losses[best * 2] = at(best * 2)
        else:
            break
    best = min(losses, key=lambda lr: losses[lr])
    for seed in SEEDS[1:]:
        at(best, seed)
    for factor in (3, 10):
        at(best * factor)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    usual = [name for name, method in METHODS.items() if not method.ablation]
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=usual)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(options.workers, context) as pool,
            ThreadPoolExecutor(options.workers) as threads,
        ):
            runs = Runs(options.out, pool, options.data)
            units = [
                threads.submit(unit, runs, task, name, options.steps)
                for task in options.tasks
                for name in options.methods
            ]
            for one in units:
                one.result()
    print(table(list(Runs(options.out, None, options.data).known.values())))


if __name__ == "__main__":
    main()
