"""The tasks of `bench_quality.py`: model, batches, losses and scores, the same for every method."""

from __future__ import annotations

import abc
import copy
import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jobs import minilm_path
from torch import Tensor, nn

from pyctrlora.demo.data import batches, split
from pyctrlora.demo.pretrain import Pretraining, default_cache, load_or_pretrain, token_loss

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Batch = dict[str, Tensor]
Rows = list[tuple[int, str]]


@dataclass
class Output:
    """What a causal model returns, as transformers' do: AdaLoRA adds its penalty to `loss`."""

    loss: Tensor


class CausalLM(nn.Module):
    """The demo's GPT with the calling convention of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Output:
        """Token ids (batch, context + 1): the loss of every token after the first."""
        return Output(token_loss(self.model(input_ids[:, :-1]), input_ids))


class Task(abc.ABC):
    """One job. Every batch is a dict that `model(**batch).loss` takes."""

    targets: str  # PEFT's regular expression for the layers
    kind: str | None = None  # PEFT's task_type
    lrs: tuple[float, ...]  # where AdamW's sweep begins
    validation: list[Batch]

    @abc.abstractmethod
    def base(self, seed: int) -> nn.Module:
        """The pretrained model, with a head drawn from `seed` if it has a fresh one."""

    @abc.abstractmethod
    def training(self, seed: int, steps: int) -> list[Batch]:
        """As many batches in an order drawn from `seed`."""

    @abc.abstractmethod
    def scores(self, model: nn.Module) -> dict[str, float]:
        """On rows that neither training nor the choice of a learning rate has seen."""


@torch.no_grad()
def mean_loss(model: nn.Module, data: Iterable[Batch]) -> float:
    """Mean over batches of equal size, in evaluation mode; inf if it is not finite."""
    model.eval()
    losses = torch.stack([model(**batch).loss.double() for batch in data])
    model.train()
    value = losses.mean().item()
    return value if math.isfinite(value) else math.inf


class LanguageModelling(Task):
    """GSM8K's problems and answers from the demo's GPT; the score is the test text's loss."""

    targets = r".*\.[qkvo]_proj|.*\.(up|down)_proj"
    lrs = (0.004, 0.008, 0.016, 0.032)

    def __init__(self, data: Path) -> None:
        self.pretrained = load_or_pretrain(Pretraining(), default_cache())
        self.context = self.pretrained.model.config.context
        train = self.tokens(data / "gsm8k.train.jsonl", 3000)
        self.ids, held_out = split(train, self.context)
        self.validation = self.windows(held_out)
        test = self.tokens(data / "gsm8k.test.jsonl", 600)
        self.test = self.windows(test.unfold(0, self.context + 1, self.context + 1)[:128])

    def tokens(self, path: Path, problems: int) -> Tensor:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:problems]]
        text = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)
        return torch.tensor(self.pretrained.tokenizer.encode(text))

    def windows(self, ids: Tensor) -> list[Batch]:
        return [{"input_ids": part} for part in ids[: len(ids) // 16 * 16].split(16)]

    def base(self, seed: int) -> nn.Module:  # noqa: ARG002 (no head to draw)
        return CausalLM(copy.deepcopy(self.pretrained.model))

    def training(self, seed: int, steps: int) -> list[Batch]:
        return [{"input_ids": ids} for ids in batches(self.ids, self.context, 8, steps, seed)]

    def scores(self, model: nn.Module) -> dict[str, float]:
        return {"test_loss": mean_loss(model, self.test)}


class Classification(Task):
    """MiniLM-L6 with a fresh head."""

    targets = r".*encoder.*(query|key|value|dense)"
    kind = "SEQ_CLS"
    lrs = (5e-4, 1e-3, 2e-3, 4e-3)
    size = 16
    length = 32

    def __init__(self, train: Rows, held_out: int) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [train[i] for i in order]
        self.rows = rows[held_out:]
        self.validation = self.batches(rows[:held_out], 50)

    def batches(self, rows: Rows, size: int) -> list[Batch]:
        """Full batches only, so that every loss counts alike."""
        out = []
        for start in range(0, len(rows) // size * size, size):
            labels, texts = zip(*rows[start : start + size], strict=True)
            batch = self.tokenizer(
                list(texts),
                padding=True,
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            )
            out.append({**batch, "labels": torch.tensor(labels)})
        return out

    def base(self, seed: int) -> nn.Module:
        import transformers

        torch.manual_seed(seed)
        model: nn.Module = transformers.AutoModelForSequenceClassification.from_pretrained(
            minilm_path(), num_labels=2
        )
        return model

    def training(self, seed: int, steps: int) -> list[Batch]:
        order: list[int] = []
        generator = torch.Generator().manual_seed(seed)
        while len(order) < steps * self.size:
            order += torch.randperm(len(self.rows), generator=generator).tolist()
        return self.batches([self.rows[i] for i in order[: steps * self.size]], self.size)

    @torch.no_grad()
    def predict(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        """Predicted and true labels."""
        model.eval()
        parts = [rows[i : i + 64] for i in range(0, len(rows), 64)]
        data = [batch for part in parts for batch in self.batches(part, len(part))]
        found = torch.cat([model(**batch).logits.argmax(-1) for batch in data])
        model.train()
        return found, torch.cat([batch["labels"] for batch in data])


class Sentiment(Classification):
    """SST-2: the share of right labels."""

    def __init__(self, data: Path) -> None:
        super().__init__(self.read(data / "sst2.train"), held_out=600)
        self.dev = self.read(data / "sst2.dev")

    def read(self, path: Path) -> Rows:
        lines = [line.split(" ", 1) for line in path.read_text("utf-8").splitlines() if line]
        return [(int(label), text) for label, text in lines]

    def scores(self, model: nn.Module) -> dict[str, float]:
        found, right = self.predict(model, self.dev)
        return {"accuracy": (found == right).double().mean().item()}


class Acceptability(Classification):
    """CoLA: Matthews' correlation, on sentences from the training's sources and from others."""

    size = 24

    def __init__(self, data: Path) -> None:
        super().__init__(self.read(data / "cola.train"), held_out=600)
        self.dev = {name: self.read(data / f"cola.{name}") for name in ("dev", "ood")}

    def read(self, path: Path) -> Rows:
        lines = [line.split("\t") for line in path.read_text("utf-8").splitlines() if line]
        return [(int(row[1]), row[3]) for row in lines]

    def scores(self, model: nn.Module) -> dict[str, float]:
        return {
            f"matthews_{name}": matthews(*self.predict(model, rows))
            for name, rows in self.dev.items()
        }


def matthews(found: Tensor, right: Tensor) -> float:
    """Correlation of two binary labels; 0 where one of them is constant."""
    pair = torch.stack([found, right]).double()
    value = torch.corrcoef(pair)[0, 1].item()
    return value if math.isfinite(value) else 0.0


def make_task(name: str, data: Path) -> Any:
    """`gsm8k`, `sst2` or `cola`."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    kinds = {"gsm8k": LanguageModelling, "sst2": Sentiment, "cola": Acceptability}
    return kinds[name](data)
