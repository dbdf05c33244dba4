"""The optimizer's step beside AdamW's, and the whole training step beside PEFT + AdamW.

    python bench/python/bench_step.py [--rounds 40] [--threads 2] [--out FILE]

`step()` alone: 56 pairs of a 7B model's shapes, r = k = 16, gradients given. "plain" is a step on
which nothing was observed; "mixed" runs the default schedule, a third of the layers observed before
each step (the sketching of the rows belongs to backward and is timed in the training step below).
Training step: a GPT of width 512 with 8 layers, PEFT's LoRA r = 8 on all linears, 16 x 128 tokens;
"ctr" with attach(), "fused" with fuse() as well, "peak" the most memory that tensors take within a
step, of weights, optimizer and activations together, beside PEFT + AdamW.
Figures are medians of ratios within one run; absolute times of a shared machine mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from common import interleaved, ratios, record
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import pyctrlora
from pyctrlora import _C

SHAPES = ((4096, 4096, 28), (11008, 4096, 28))  # attention and MLP of a 7B model
RANK = 16


def make_pairs(shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> list[_C.LoraPair]:
    """Registered pairs with gradients."""
    pairs = []
    for m, n, count in shapes:
        for number in range(count):
            a = torch.nn.Parameter(torch.randn(RANK, n) / n**0.5)
            b = torch.nn.Parameter(torch.randn(m, RANK) / m**0.5)
            a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
            pair = _C.LoraPair(a, b, 2.0, f"{m}x{n}.{number}")
            _C.register_pair(pair)
            pairs.append(pair)
    return pairs


def tensors(pairs: list[_C.LoraPair]) -> list[Tensor]:
    """Both tensors of all pairs."""
    return [t for pair in pairs for t in (pair.a, pair.b)]


def observe(pairs: list[_C.LoraPair], rows: dict[int, Tensor]) -> None:
    """What a backward would deliver: rows for every layer that wants them."""
    for pair in pairs:
        slot = _C.find_slot(pair.a)
        if slot is not None and slot.wanted:
            m, n = pair.b.shape[0], pair.a.shape[1]
            capture = slot.capture(rows[n], rows[m])
            capture.complete(rows[m])


def launches(count: int) -> int:
    """Operators that one plain step runs for `count` equal pairs."""
    pairs = make_pairs(((64, 64, count),))
    optimizer = pyctrlora.CTROptimizer(tensors(pairs), factor_every=10**6, factor_warmup_steps=0)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        optimizer.step()
    return sum(event.count for event in trace.key_averages() if event.key.startswith("aten::"))


def bench_step(rounds: int) -> dict[str, Any]:
    """`step()` alone beside torch's AdamW(fused)."""
    rows = {size: torch.randn(256, size) for size in (4096, 11008)}
    adamw = torch.optim.AdamW(tensors(make_pairs()), lr=1e-3, fused=True)
    for parameter in adamw.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    plain_pairs, mixed_pairs = make_pairs(), make_pairs()
    plain = pyctrlora.CTROptimizer(tensors(plain_pairs), sketch_rank=RANK, factor_every=10**6)
    mixed = pyctrlora.CTROptimizer(tensors(mixed_pairs), sketch_rank=RANK)
    for _ in range(6):  # the warm-up observes every layer
        observe(plain_pairs, rows)
        plain.step()
        observe(mixed_pairs, rows)
        mixed.step()
    seconds: dict[str, list[float]] = {"adamw": [], "plain": [], "mixed": []}
    for _ in range(rounds):
        observe(mixed_pairs, rows)
        once = interleaved({"adamw": adamw.step, "plain": plain.step, "mixed": mixed.step}, 1, 0)
        for name, values in once.items():
            seconds[name] += values
    adam_bytes = sum(
        t.nbytes for state in adamw.state.values() for t in state.values() if t.dim() > 0
    )
    basis_bytes = sum(
        t.nbytes for t in tensors(plain_pairs)
    )  # k = r: a basis is as large as its pair
    return {
        "plain_to_adamw": ratios(seconds, "plain", "adamw"),
        "mixed_to_adamw": ratios(seconds, "mixed", "adamw"),
        "milliseconds": {name: 1e3 * statistics.median(s) for name, s in seconds.items()},
        "state_bytes": plain.metrics()["state_bytes"],
        "state_allowed": adam_bytes + basis_bytes,
        "launches": {count: launches(count) for count in (4, 16, 64)},
        "targets": {"plain median": 3.0, "plain p95": 4.0},
    }


def gpt(seed: int = 0) -> torch.nn.Module:
    """A GPT of width 512 with 8 layers and PEFT's LoRA on all linears; nothing is downloaded."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=2048,
        max_position_embeddings=128,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(LlamaForCausalLM(config), lora)


def training_runs() -> dict[str, TrainingRun]:
    """The same job with AdamW(fused), with CTROptimizer, and with CTROptimizer on fused layers."""
    tokens = torch.randint(0, 2048, (16, 128))
    runs = {}
    for name in ("adamw", "ctr", "fused"):
        model = gpt()
        if name == "fused":
            pyctrlora.fuse(model)
        if name == "adamw":
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer: Any = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        else:
            optimizer = pyctrlora.CTROptimizer.from_model(model, lr=0.01)
        runs[name] = TrainingRun(model, optimizer, tokens)
    return runs


@dataclass
class TrainingRun:
    """One model, its optimizer and its only batch."""

    model: torch.nn.Module
    optimizer: Any
    tokens: Tensor

    def __call__(self) -> None:
        """One training step."""
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_bytes(self, steps: int = 3) -> int:
        """Most bytes of tensors at any moment of so many steps: one of each third of the layers."""
        kept = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))
        if isinstance(self.optimizer, pyctrlora.CTROptimizer):
            kept += int(self.optimizer.metrics()["state_bytes"])
        else:
            kept += sum(t.nbytes for s in self.optimizer.state.values() for t in s.values())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            for _ in range(steps):
                self()
        with tempfile.TemporaryDirectory() as folder:
            trace.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
        events = [e for e in events if e["name"] == "[memory]"]
        changes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
        return kept + max(accumulate(changes))


def bench_training(rounds: int) -> dict[str, Any]:
    """Whole training step beside the same loop with PEFT's own layers and AdamW(fused)."""
    runs = training_runs()
    seconds = interleaved(runs, rounds, warm_up=6)  # past the steps that observe every layer
    peak = {name: run.peak_bytes() for name, run in runs.items()}
    return {
        "ctr_to_adamw": ratios(seconds, "ctr", "adamw"),
        "fused_to_adamw": ratios(seconds, "fused", "adamw"),
        "peak_to_adamw": {name: peak[name] / peak["adamw"] for name in ("ctr", "fused")},
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
    parser.add_argument("--out", type=Path)
    parser.add_argument("--training-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    result = {} if arguments.training_only else {"step": bench_step(arguments.rounds)}
    result["training_step"] = bench_training(arguments.training_rounds)
    record("step", result, arguments.out)


if __name__ == "__main__":
    main()
