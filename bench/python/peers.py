"""Optimizers of other projects on the jobs of `jobs.py`; what is not installed is left out.

`pip install --no-deps pytorch_optimizer==4.1.0 heavyball==3.2.1 singd==0.0.5` (what `./dev bench
--full` does) leaves torch as it is.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jobs import SCHEDULES, TrainingRun, make_pairs, observing, tensors
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jobs import Shapes


@dataclass
class Contender:
    """One optimizer with parameters of its own."""

    name: str
    optimizer: Any
    prepare: Callable[[], None]  # before each step, not timed
    share: float = 1.0  # of the job's pairs that it has
    period: int = 1  # steps after which its work repeats


def named(pairs: list[Any]) -> nn.Module:
    """The pairs as a model whose parameters are called as PEFT's."""
    model = nn.Module()
    model.layers = nn.ModuleList()
    for pair in pairs:
        layer = nn.Module()
        for name, weight in (("lora_A", pair.a), ("lora_B", pair.b)):
            half = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            half.weight = weight
            setattr(layer, name, nn.ModuleDict({"default": half}))
        model.layers.append(layer)
    return model


def with_gradients(pairs: list[Any]) -> Callable[[], None]:
    """Gradients as they are now, put back before each step: some optimizers change or drop them."""
    parameters = tensors(pairs)
    kept = [p.grad.clone() for p in parameters]

    def put_back() -> None:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient.clone()

    return put_back


def contenders(shapes: Shapes, rank: int, soap_pairs: int, missing: dict[str, str]) -> list[Any]:
    """AdamW twice, ours, and every peer that is installed.

    Args:
        shapes: (m, n, count).
        rank: r = k.
        soap_pairs: pairs of each shape for SOAP, which keeps two matrices of every dimension; the
            time of all is that of these, scaled.
        missing: gets the reason why a peer does not run.
    """
    out: list[Contender] = []

    def add(name: str, make: Callable[[list[Any]], Any], own: Shapes = shapes, period: int = 1):
        pairs = make_pairs(own, rank)
        share = len(pairs) / sum(count for _, _, count in shapes)
        try:
            optimizer = make(pairs)
        except ImportError as error:
            missing[name] = str(error)
            return
        out.append(Contender(name, optimizer, with_gradients(pairs), share, period))

    add("adamw_fused", lambda p: torch.optim.AdamW(tensors(p), lr=1e-4, fused=True))
    add("adamw_foreach", lambda p: torch.optim.AdamW(tensors(p), lr=1e-4, foreach=True))
    out += ours(shapes, rank)
    add("riemannian_adamw", lambda p: _riemannian(named(p), lr=1e-4))
    add("lora_rite", lambda p: _pytorch_optimizer("LoRARite")(tensors(p), lr=1e-4))
    few = tuple((m, n, min(soap_pairs, count)) for m, n, count in shapes)
    add("soap", lambda p: _pytorch_optimizer("SOAP")(tensors(p), lr=1e-4), few, period=10)
    add("heavyball_soap", lambda p: _heavyball(tensors(p)), few, period=2)
    return out


def ours(shapes: Shapes, rank: int) -> Iterator[Contender]:
    """The default schedule, a third of the layers a step, none of them, and bases in bfloat16."""
    kinds: dict[str, dict[str, Any]] = {"ctr": {}}
    kinds |= {f"ctr_{name}": {"factor_every": SCHEDULES[name]} for name in ("thirds", "plain")}
    kinds["ctr_bfloat16"] = {"basis_dtype": "bfloat16"}
    for name, options in kinds.items():
        optimizer, prepare = observing(shapes, rank, sketch_rank=rank, **options)
        yield Contender(name, optimizer, prepare, period=24)


def _riemannian(model: nn.Module, **options: Any) -> Any:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, torch.optim.AdamW, fused=True, **options)


def _pytorch_optimizer(name: str) -> Any:
    import pytorch_optimizer

    return getattr(pytorch_optimizer, name)


def _heavyball(parameters: list[torch.Tensor]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import heavyball

    # Its kernels go through torch.compile by default, which takes longer than this bench; eager
    # mode runs the same operators. Dimensions above 2048 get no preconditioner by its default.
    heavyball.utils.compile_mode = None
    return heavyball.SOAP(parameters, lr=1e-4)


# ---- whole training steps ----


class AdaLora(TrainingRun):
    """PEFT's AdaLoRA, whose budget moves after every step."""

    steps = 0

    def __call__(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.steps += 1
        self.model.base_model.update_and_allocate(self.steps)
        self.optimizer.zero_grad()


def training_peers(
    build: Any, batch: dict[str, torch.Tensor], missing: dict[str, str]
) -> dict[str, TrainingRun]:
    """AdaLoRA, Riemannian + AdamW and SINGD on the models that `build` makes."""
    from peft import AdaLoraConfig

    like = build().peft_config["default"]
    config = AdaLoraConfig(
        init_r=12,
        target_r=8,
        tinit=4,
        tfinal=100,
        deltaT=4,
        total_step=10_000,
        lora_alpha=16,
        target_modules=like.target_modules,
        task_type=like.task_type,
    )
    model = build(config)
    runs: dict[str, TrainingRun] = {"adalora": AdaLora(model, _adamw(model), batch)}
    model = build()
    runs["riemannian_adamw"] = TrainingRun(model, _riemannian(model, lr=1e-4), batch)
    try:
        from singd.optim.optimizer import SINGD
    except ImportError as error:
        missing["singd"] = str(error)
        return runs
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters that it cannot train
        trained = [p for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad]
        runs["singd"] = TrainingRun(model, SINGD(model, trained, lr=1e-6, T=3), batch)
    return runs


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
