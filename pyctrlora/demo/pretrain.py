"""The demo's base model: trained on the standard library's source once, then read from a cache."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from pyctrlora.demo.data import BytePairTokenizer, batches, source_code, split
from pyctrlora.demo.model import GPT, GPTConfig
from pyctrlora.files import replacing

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Pretraining:
    """Settings of the pretraining; the cache's key is made of all of them and Python's version.

    Attributes:
        model: sizes of the network.
        steps: 700 take some 90 s on two cores and reach 3.5 of log(2048) = 7.6 nats per token.
        batch: sequences a step.
        matrix_lr: Muon's learning rate for the blocks' matrices, in units of AdamW's RMS.
        other_lr: AdamW's for embeddings, biases and norms.
        seed: of the initial weights and the batches.
    """

    model: GPTConfig = field(default_factory=GPTConfig)
    steps: int = 700
    batch: int = 8
    matrix_lr: float = 6e-3
    other_lr: float = 6e-3
    seed: int = 0

    @property
    def characters(self) -> int:
        """Characters of source to read: more than the steps see, enough for the tokenizer."""
        return min(4_000_000, 300_000 + 10_000 * self.steps)


@dataclass
class Base:
    """A pretrained model with its tokenizer.

    Attributes:
        model: the network.
        tokenizer: learnt on the same source.
        code_loss: validation loss on held-out source, nats per token.
        seconds: what the pretraining took when it ran.
        cached: whether it was read from the cache.
    """

    model: GPT
    tokenizer: BytePairTokenizer
    code_loss: float
    seconds: float
    cached: bool = False


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/pyctrlora`, by default `~/.cache/pyctrlora`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyctrlora"


def load_or_pretrain(
    settings: Pretraining, cache: Path, say: Callable[[str], None] = print
) -> Base:
    """Reads the base model of these settings from `cache`, or trains and stores it there.

    Args:
        settings: what to train.
        cache: folder, made if need be.
        say: receives a line per stage.
    """
    path = cache / f"gpt-{_key(settings)}.safetensors"
    if path.exists():
        try:
            return _load(path, settings)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            say(f"the cached model {path} cannot be read ({error}); pretraining anew")
    base = _pretrain(settings)
    _save(path, base)
    return base


def _key(settings: Pretraining) -> str:
    described = asdict(settings) | {"format": 1, "python": platform.python_version()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _load(path: Path, settings: Pretraining) -> Base:
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = GPT(settings.model)
    model.load_state_dict(state)
    tokenizer = BytePairTokenizer(json.loads(meta["merges"]))
    return Base(model, tokenizer, float(meta["code_loss"]), float(meta["seconds"]), cached=True)


def _save(path: Path, base: Base) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {
        "merges": json.dumps(base.tokenizer.merges),
        "code_loss": repr(base.code_loss),
        "seconds": repr(base.seconds),
    }
    with replacing(path) as temporary:
        save_file(base.model.state_dict(), temporary, metadata=meta)


def _pretrain(settings: Pretraining) -> Base:
    began = time.perf_counter()
    context = settings.model.context
    source = source_code(settings.characters)
    tokenizer = BytePairTokenizer.train(source, settings.model.vocabulary)
    train, validation = split(torch.tensor(tokenizer.encode(source)), context)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = GPT(settings.model)
    optimizers = _optimizers(model, settings)
    ramps = [LambdaLR(o, lambda i: warm_up_and_decay(i, settings.steps)) for o in optimizers]
    data = batches(train, context, settings.batch, settings.steps, settings.seed)
    bar = tqdm(data, desc="pretraining on the standard library", leave=False, disable=None)
    for tokens in bar:
        loss = token_loss(model(tokens[:, :-1]), tokens)
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, ramp in zip(optimizers, ramps, strict=True):
            optimizer.step()
            ramp.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return Base(model, tokenizer, mean_loss(model, validation), time.perf_counter() - began)


def _optimizers(model: GPT, settings: Pretraining) -> list[torch.optim.Optimizer]:
    """Muon for the matrices: 3.8 nats after 600 steps, where AdamW has 4.6 after 900."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=settings.matrix_lr, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=settings.other_lr, betas=(0.9, 0.99), fused=True),
    ]


def warm_up_and_decay(step: int, steps: int, warm_up: float = 0.08) -> float:
    """Factor on the learning rate: linear up over the first 8 % of the steps, then down to 0.

    Example:
        >>> [warm_up_and_decay(i, 4, warm_up=0.25) for i in range(5)]
        [1.0, 1.0, 0.6666666666666666, 0.3333333333333333, 0.0]
    """
    up = max(1, round(warm_up * steps))
    return min((step + 1) / up, (steps - step) / max(1, steps - up))


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy, nats per token, of logits (B, T, V) for windows of tokens (B, T + 1)."""
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: Callable[[Tensor], Tensor], windows: Tensor, batch: int = 8) -> float:
    """Loss in nats per token over all windows (N, T + 1)."""
    parts = torch.split(windows, batch)
    return math.fsum(token_loss(model(w[:, :-1]), w).item() * len(w) for w in parts) / len(windows)
