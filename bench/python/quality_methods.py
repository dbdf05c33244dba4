"""The methods of `bench_quality.py`: how each makes its adapters and its optimizer.

All adapt the same layers at rank r with alpha = 2 r, so that a learning rate means the same.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import peft
import peft.optimizers
import torch
from torch import nn

import pyctrlora

if TYPE_CHECKING:
    from collections.abc import Callable

    from quality_tasks import Batch, Task

CALIBRATION = 8  # batches, for the methods that look at the data first


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        rank: a factor on the common rank.
        adapter: how the adapters are made: "lora" with `config` or by name; "full" has none.
        config: further arguments of PEFT's LoraConfig.
        optimizer: "adamw", "loraplus", "riemannian", "rite" or "ctr".
        options: CTROptimizer's.
        fused: PEFT's layers run as `pyctrlora.fuse` has them.
        lrs: where the sweep begins; None: the task's for AdamW, times `lr_scale`.
        lr_scale: how large a learning rate is beside AdamW's.
        ablation: run only where it is named.
        about: what it is.
    """

    about: str
    rank: float = 1.0
    adapter: str = "lora"
    config: tuple[tuple[str, Any], ...] = ()
    optimizer: str = "adamw"
    options: tuple[tuple[str, Any], ...] = ()
    fused: bool = False
    lrs: tuple[float, ...] | None = None
    lr_scale: float = 1.0
    ablation: bool = False


HALF = (("rank_budget", 0.5),)
QUARTER = (("rank_budget", 0.25),)


def ctr(about: str, **kwargs: Any) -> Method:
    return Method(about, optimizer="ctr", lr_scale=10.0, **kwargs)


METHODS = {
    "lora": Method("LoRA, AdamW"),
    "ctr": ctr("tangent step alone"),
    "ctr_fused": ctr("tangent step alone, layers by fuse", fused=True),
    "ctr_cg": ctr("with cg_init", adapter="cg"),
    "ctr_half": ctr("half of the parameters, ranks by rank_budget", options=HALF),
    "ctr_half_wide": ctr("as many, from twice the rank", rank=2.0, options=QUARTER, ablation=True),
    "ctr_half_cg": ctr("the same after cg_init", adapter="cg", options=HALF),
    "ctr_uniform_half": ctr("half of the rank everywhere", rank=0.5),
    "lora_fused": Method("LoRA, AdamW, layers by fuse", fused=True),
    "lora_half": Method("LoRA, AdamW, half of the rank", rank=0.5),
    "adalora_half": Method("AdaLoRA to half of the rank", rank=0.5, adapter="adalora"),
    "rslora": Method("rank-stabilised scaling", config=(("use_rslora", True),)),
    "loraplus": Method("LoRA+, ratio 16", optimizer="loraplus"),
    "dora": Method("DoRA", config=(("use_dora", True),)),
    "adalora": Method("AdaLoRA", adapter="adalora"),
    "lora_ga": Method("LoRA-GA's start", adapter="lora_ga"),
    "eva": Method("EVA's start", adapter="eva"),
    "riemannian": Method("PEFT's Riemannian preconditioned AdamW", optimizer="riemannian"),
    "rite": Method("LoRA-RITE", optimizer="rite"),
    "full": Method("full fine-tuning", adapter="full", lrs=(1e-4, 2e-4, 4e-4, 8e-4)),
}

NO_HEAD_STEP = (("head_step", 0.0),)
METHODS |= {  # on tasks with a fresh head
    f"{name}_{tag}": replace(
        own, about=f"{own.about}; {about}", options=(*own.options, *options), ablation=True
    )
    for name, own in METHODS.items()
    if own.optimizer == "ctr" and not own.ablation
    for tag, about, options in (
        ("no_head_step", "the head by AdamW's own length", NO_HEAD_STEP),
        (
            "no_head_ball",
            "that, and without the head ball",
            (*NO_HEAD_STEP, ("head_radius", math.inf)),
        ),
    )
}


def calibrate(model: nn.Module, data: list[Batch]) -> Callable[[], None]:
    """A step for the initialisations that look at gradients."""
    batches = itertools.cycle(data)
    return lambda: model(**next(batches)).loss.backward()


def make_model(task: Task, method: Method, seed: int, rank: int, steps: int) -> nn.Module:
    """The base with what the method trains, in training mode."""
    base = task.base(seed)
    data = task.training(seed + 1000, CALIBRATION)
    if method.adapter == "full":
        return base.train()
    own = max(1, round(rank * method.rank))
    settings: dict[str, Any] = {
        "r": own,
        "lora_alpha": 2 * own,
        "target_modules": task.targets,
        "task_type": task.kind,
        **dict(method.config),
    }
    torch.manual_seed(seed)
    if method.adapter == "adalora":
        config = adalora(settings, steps)
        return peft.get_peft_model(base, config).train()
    if method.adapter == "lora_ga":
        settings.update(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    if method.adapter == "eva":
        eva = peft.tuners.lora.config.EvaConfig(rho=1.0)
        settings.update(init_lora_weights="eva", eva_config=eva)
    config = peft.LoraConfig(**settings)
    if method.adapter == "lora_ga":
        step = calibrate(base, data)
        peft.tuners.lora.preprocess_loraga(base, config, lambda: [step() for _ in data])
    model: nn.Module = peft.get_peft_model(base, config)
    if method.adapter == "eva":
        inputs = [{k: v for k, v in b.items() if k != "labels"} for b in data]
        plain = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": all_rows}
        peft.initialize_lora_eva_weights(
            model, inputs, show_progress_bar=False, **(plain if task.kind is None else {})
        )
    if method.adapter == "cg":
        step = calibrate(model, data)
        pyctrlora.cg_init(model, step, batches=CALIBRATION, progress=False)
    if method.fused:
        pyctrlora.fuse(model)
    return model.train()


def all_rows(inputs: Any, *_: Any) -> torch.Tensor:
    """EVA's rows where nothing is padded."""
    rows = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
    return rows.flatten(0, -2)


def adalora(settings: dict[str, Any], steps: int) -> peft.AdaLoraConfig:
    """From 1.5 times the rank to the rank, as the paper does, over the middle of the run."""
    rank = settings.pop("r")
    return peft.AdaLoraConfig(
        init_r=round(1.5 * rank),
        target_r=rank,
        tinit=steps // 10,
        tfinal=steps // 2,
        deltaT=max(1, steps // 50),
        total_step=steps,
        **settings,
    )


def make_optimizers(model: nn.Module, method: Method, lr: float, steps: int) -> list[Any]:
    """Over everything that the model trains: adapters and a fresh head."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if method.optimizer == "ctr":
        options = dict(method.options)
        return [pyctrlora.CTROptimizer.from_model(model, lr=lr, total_steps=steps, **options)]
    if method.optimizer in ("loraplus", "riemannian"):
        kind = {"lr": lr, "weight_decay": 0.0}
        if method.optimizer == "riemannian":
            create = peft.optimizers.create_riemannian_optimizer
            return [create(model, torch.optim.AdamW, **kind)]
        create = peft.optimizers.create_loraplus_optimizer
        return [create(model, torch.optim.AdamW, loraplus_lr_ratio=16.0, **kind)]
    if method.optimizer == "rite":  # pairs only: A, B in turn; the head goes to AdamW
        pairs = [p for n, p in trained.items() if "lora_" in n]
        head = [p for n, p in trained.items() if "lora_" not in n]
        adamw = [torch.optim.AdamW(head, lr=lr, weight_decay=0.0)] if head else []
        return [lora_rite(pairs, lr), *adamw]
    return [torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)]


def lora_rite(pairs: list[nn.Parameter], lr: float) -> Any:
    try:
        from pytorch_optimizer import LoRARite
    except ImportError:
        raise RuntimeError("Remedy: pip install --no-deps pytorch_optimizer==4.1.0") from None
    return LoRARite(pairs, lr=lr)
