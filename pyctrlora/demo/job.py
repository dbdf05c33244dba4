"""What is fine-tuned: the demo's own GPT on its prose, or the user's model and text."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import pyctrlora
from pyctrlora.demo.data import prose, split

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pyctrlora.demo.pretrain import Base

# AdamW's optimum for LoRA lies near 0.01 on the small GPT and near 0.001 on real models.
GPT_ADAMW_LRS = (0.008, 0.011, 0.016, 0.022)
TRANSFORMERS_ADAMW_LRS = (0.0005, 0.001, 0.002, 0.004)


@dataclass(frozen=True)
class Job:
    """Everything that two optimizers must share to be compared.

    Attributes:
        model: what is trained, in words.
        text: on what, in words.
        make: builds the model with fresh adapters, all that is trained, from a seed.
        logits: (model, token ids (B, T)) to (B, T, vocabulary).
        save: writes the adapter of a trained model below a folder and returns the file.
        train: (tokens,) the training stream.
        validation: (windows, context + 1).
        context: tokens of a window that are predicted.
        vocabulary: size; log of it is the loss of a uniform guess.
        adamw_lrs: where AdamW's sweep begins.
    """

    model: str
    text: str
    make: Callable[[int], nn.Module]
    logits: Callable[[nn.Module, Tensor], Tensor]
    save: Callable[[nn.Module, Path], Path]
    train: Tensor
    validation: Tensor
    context: int
    vocabulary: int
    adamw_lrs: tuple[float, ...]

    @property
    def uniform_loss(self) -> float:
        """Loss of a uniform guess, nats per token."""
        return math.log(self.vocabulary)


def gpt_job(base: Base, rank: int, text: Path | None = None) -> Job:
    """The demo's GPT with `pyctrlora.add_lora` on all linears.

    Args:
        base: the pretrained model.
        rank: of the adapters; alpha is twice that.
        text: a UTF-8 file; None takes Python's language reference.
    """
    config = base.model.config

    def make(seed: int) -> nn.Module:
        model = copy.deepcopy(base.model)
        torch.manual_seed(seed)
        return pyctrlora.add_lora(model, rank=rank, alpha=2 * rank, targets="all-linear")

    def save(model: nn.Module, folder: Path) -> Path:
        from safetensors.torch import save_file

        path = folder / "adapter.safetensors"
        save_file(_adapter(model), path, metadata={"rank": str(rank), "alpha": str(2 * rank)})
        return path

    ids = torch.tensor(base.tokenizer.encode(_read(text)))
    train, validation = split(ids, config.context)
    return Job(
        model=f"GPT of {_millions(base.model)} parameters, pretrained on the standard library",
        text=_describe(text),
        make=make,
        logits=lambda model, tokens: model(tokens),
        save=save,
        train=train,
        validation=validation,
        context=config.context,
        vocabulary=config.vocabulary,
        adamw_lrs=GPT_ADAMW_LRS,
    )


def transformers_job(folder: Path, rank: int, text: Path | None = None, context: int = 128) -> Job:
    """Any causal language model of a transformers folder, with PEFT's LoRA on all linears.

    Args:
        folder: holds the model and its tokenizer; nothing is downloaded.
        rank: of the adapters; alpha is twice that.
        text: a UTF-8 file; None takes Python's language reference.
        context: tokens of a window.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"[pyctrlora.demo] expected a transformers folder with a config.json; got {folder}. "
            "Remedy: pass the folder that `save_pretrained` wrote."
        )
    import peft
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    base.config.use_cache = False
    conv1d = any(type(module).__name__ == "Conv1D" for module in base.modules())
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=conv1d
    )

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
        return model

    def save(model: nn.Module, folder: Path) -> Path:
        assert isinstance(model, peft.PeftModel)
        model.save_pretrained(str(folder / "adapter"), state_dict=_adapter(model))
        return folder / "adapter" / "adapter_model.safetensors"

    longest = getattr(base.config, "max_position_embeddings", None) or context
    context = min(context, longest)
    ids = tokenizer(_read(text), add_special_tokens=False, verbose=False)["input_ids"]
    train, validation = split(torch.tensor(ids), context)
    return Job(
        model=f"{type(base).__name__} of {_millions(base)} parameters from {folder.name}",
        text=_describe(text),
        make=make,
        logits=lambda model, tokens: model(input_ids=tokens).logits,
        save=save,
        train=train,
        validation=validation,
        context=context,
        vocabulary=base.config.vocab_size,
        adamw_lrs=TRANSFORMERS_ADAMW_LRS,
    )


def _adapter(model: nn.Module) -> dict[str, Tensor]:
    # Cloned: an engine keeps the parameters as views of one slab, which safetensors refuses.
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def _read(text: Path | None) -> str:
    return prose() if text is None else text.read_text(encoding="utf-8", errors="replace")


def _describe(text: Path | None) -> str:
    return "Python's language reference (pydoc_data.topics)" if text is None else text.name


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
