"""The engine's side of a parity test: the same model, compared with the reference by quantity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from parity.problems import ReferenceLinear
from torch import Tensor, nn

import pyctrlora

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from parity.problems import ReferenceModel
    from reference.ctr_reference import Group, Layer, Settings

# Above any size in these tests: complete bases, every row taken.
EVERYTHING = {"sketch_rank": 256, "sample_rows": 100_000}


def options_of(o: Settings) -> dict[str, Any]:
    """The reference's settings as CTROptimizer's options."""
    given = dict(vars(o))
    given["sketch_rank"] = EVERYTHING["sketch_rank"]
    given["sample_rows"] = EVERYTHING["sample_rows"]
    given["loss_terms"] = {0: "tokens", -1: "sequences"}.get(o.loss_terms, o.loss_terms)
    return given


def adapted(source: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model of `ReferenceLinear`s built with `add_lora`, at the same weights."""

    def convert(module: nn.Module) -> nn.Module:
        if isinstance(module, ReferenceLinear):
            linear = nn.Linear(module.a.shape[1], len(module.b), bias=module.bias is not None)
            linear = linear.to(dtype)
            linear.weight.data.copy_(module.weight)
            if module.bias is not None:
                linear.bias.data.copy_(module.bias)
            return linear
        children = [convert(child) for child in module.children()]
        return nn.Sequential(*children) if children else module

    pairs = [m.layer for m in source.modules() if isinstance(m, ReferenceLinear)]
    rank, scaling = pairs[0].a.shape[0], pairs[0].scaling
    model = pyctrlora.add_lora(convert(source), rank=rank, alpha=scaling * rank)
    for layer, pair in zip(own_layers(model), pairs, strict=True):
        layer.lora_a.data.copy_(pair.a)
        layer.lora_b.data.copy_(pair.b)
    return model


def own_layers(model: nn.Module) -> list[pyctrlora.LoRALinear]:
    return [m for m in model.modules() if isinstance(m, pyctrlora.LoRALinear)]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over that of the reference's value."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    scale = float(theirs.norm())
    return float((ours - theirs).norm()) / scale if scale > 0 else float(ours.norm())


class Twins:
    """One model twice: `step` moves both, `deviations` lists how far apart they are."""

    def __init__(
        self, reference: ReferenceModel, dtype: torch.dtype = torch.float64, **changes: Any
    ) -> None:
        self.reference, self.pairs = reference, reference.reference.layers
        self.model = adapted(reference.model, dtype)
        self.layers = own_layers(self.model)
        self.moved = self.pairs
        self.starts = [self.product(i) for i in range(len(self.pairs))]
        groups = sorted({pair.group for pair in self.pairs})
        params = [
            {"params": [p for own in self._of(group) for p in (own.lora_a, own.lora_b)]}
            for group in groups
        ]
        o = options_of(reference.reference.settings)
        self.optimizer = pyctrlora.CTROptimizer(params, **(o | changes))

    def _of(self, group: int) -> list[pyctrlora.LoRALinear]:
        return [
            own for own, pair in zip(self.layers, self.pairs, strict=True) if pair.group == group
        ]

    def product(self, index: int) -> Tensor:
        own = self.layers[index]
        return (own.scaling * own.lora_b @ own.lora_a).detach()

    def wanted(self) -> list[bool]:
        return [pyctrlora._C.find_slot(own.lora_a).wanted for own in self.layers]

    def step(
        self, losses: Sequence[Callable[[nn.Module], Tensor]], groups: Sequence[Group]
    ) -> tuple[float, float]:
        """Both take one step on their own model; returns the two losses, engine's first."""
        total = 0.0
        for loss_of in losses:
            loss = loss_of(self.model)
            loss.backward()
            total += float(loss.detach())
        for own, group in zip(self.optimizer.param_groups, groups, strict=True):
            own.update(lr=group.lr, initial_lr=group.initial_lr, weight_decay=group.weight_decay)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.moved = [pair for pair in self.pairs if groups[pair.group].lr != 0]
        return total, self.reference.step(losses, list(groups))

    def state(self, index: int) -> dict[str, Tensor]:
        """The engine's tensors of one layer, by their names without the group's prefix."""
        key = self._key(self.pairs[index])
        kinds = list(dict.fromkeys(sorted((self._key(p) for p in self.pairs), key=self._first)))
        position = [p for p in self.pairs if self._key(p) == key].index(self.pairs[index])
        prefix = f"group{kinds.index(key)}."
        tensors = self.optimizer.state_dict()["ctrlora"]["tensors"]
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        return {k: v[position] for k, v in own.items() if k not in ("age", "share_set")}

    def _first(self, key: tuple[Any, ...]) -> tuple[int, int]:
        return key[0], min(i for i, p in enumerate(self.pairs) if self._key(p) == key)

    @staticmethod
    def _key(pair: Layer) -> tuple[Any, ...]:
        return pair.group, tuple(pair.a.shape), tuple(pair.b.shape)

    def deviations(self) -> list[tuple[str, float]]:
        """(quantity, relative deviation), in the order in which a step computes them."""
        found: list[tuple[str, float]] = []
        for index, pair in enumerate(self.pairs):
            own = self.state(index)
            for name in ("input", "output"):
                ours = dense(own[f"{name}.basis"], own[f"{name}.eigenvalues"], own[f"{name}.trace"])
                average = getattr(pair, f"{name}_factor").value
                theirs = torch.eye(len(ours)) if average is None else average
                found.append((f"layer {index} {name} factor", relative(ours, theirs)))
            if pair.base_square.value is not None:
                found.append(
                    (
                        f"layer {index} base_square",
                        relative(own["base_square"], pair.base_square.value),
                    )
                )
            rms = torch.tensor(pair.rms.biased, dtype=torch.float64)
            found.append((f"layer {index} rms_square", relative(own["rms_square"], rms)))
            if pair.updates:  # the product is what no gauge changes
                ours = own["momentum_b"].double() @ own["momentum_a"].double()
                theirs = pair.momentum_b @ pair.momentum_a
                found.append((f"layer {index} momentum", relative(ours, theirs)))
        metrics = self.optimizer.metrics()
        for name, theirs in self.step_totals().items():
            found.append((name, relative(torch.tensor(metrics[name]), torch.tensor(theirs))))
        for index, (pair, start) in enumerate(zip(self.pairs, self.starts, strict=True)):
            found.append((f"layer {index} sBA", self._weight_deviation(index, pair, start)))
        return found

    def _weight_deviation(self, index: int, pair: Layer, start: Tensor) -> float:
        theirs, ours = pair.scaling * pair.b @ pair.a, self.product(index)
        scale = float(theirs.norm())
        if ours.dtype is torch.float64:
            # By the change since the start: much stricter. Not so in float32, where storing A and B
            # alone rounds 6e-8 of sBA, and sBA is hundreds of times its change.
            scale = max(float((theirs - start).norm()), 1e-6 * scale)
        return float((ours.double() - theirs).norm()) / (scale or 1.0)

    def step_totals(self) -> dict[str, float]:
        reference = self.reference.reference
        decrease = reference.phi * sum(pair.f * pair.predicted for pair in self.moved)
        return {
            "predicted_kl": reference.kl,
            "kl_shrink": reference.kl_phi,
            "predicted_decrease": decrease,
        }


def dense(basis: Tensor, eigenvalues: Tensor, trace: Tensor) -> Tensor:
    """U diag(e) Uᵀ + ρ (I − UUᵀ); a basis of zeros stands for a factor that saw nothing, I."""
    u, size = basis.double(), len(basis)
    rest = size - u.shape[1]
    tail = (trace - eigenvalues.sum()) / rest if rest else torch.zeros(())
    if not u.any():
        return torch.eye(size, dtype=torch.float64)
    inside = (u * (eigenvalues - tail)) @ u.T
    return inside + tail * torch.eye(size, dtype=torch.float64)
