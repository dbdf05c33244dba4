"""Several processes that train one model: DDP, by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyctrlora import _C

_WHERE = "[pyctrlora.CTROptimizer]"
# "auto": torch.distributed's default group once it is initialised; None: this process alone.
Group = Any | Literal["auto"] | None


def usable(group: Group) -> Any:
    """The process group to work with, or None if there is one process."""
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    chosen = dist.group.WORLD if isinstance(group, str) else group
    return chosen if dist.get_world_size(chosen) > 1 else None


def join(engine: _C.Engine, group: Any) -> None:
    """Makes the engine add up its observations over the group. Talks to nobody yet."""
    # The default group goes by None: held here, its threads would outlive destroy_process_group().
    named = None if group is dist.group.WORLD else group

    def all_reduce(tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            dist.all_reduce(tensor, group=named)

    engine.set_processes(all_reduce, dist.get_rank(group), dist.get_world_size(group))


def check_agreement(
    pairs: list[tuple[int, _C.LoraPair]],
    heads: list[list[int]],
    config: dict[str, Any],
    group: Any,
) -> None:
    """Compares layers, heads, options, parameters and gradients of all processes, once.

    Raises:
        ValueError: in every process, naming each one that differs from the first and in what.
    """
    # A function's printed address differs between processes that mean the same.
    options = [(k, "a function" if callable(v) else v) for k, v in sorted(config.items())]
    own = {"options": repr(options), "observed heads": repr(heads)}
    for index, pair in pairs:
        key = f"layer '{pair.name}'"
        shape = [*pair.b.shape, *pair.a.shape, str(pair.a.dtype), float(pair.scaling)]
        own[key] = f"(m, r, r, n, dtype, scaling) {shape} in parameter group {index}"
        own[f"{key}: parameters"] = _digest(pair.a, pair.b)
        own[f"{key}: gradients"] = _digest(pair.a.grad, pair.b.grad)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    lines = []
    for rank, other in enumerate(everyone):
        differing = [
            f"\n  process {rank}, {key}: {other.get(key, 'none')}; process 0: "
            f"{everyone[0].get(key, 'none')}"
            for key in {**everyone[0], **other}
            if other.get(key) != everyone[0].get(key)
        ]
        lines += differing[:4]
        if len(differing) > 4:
            lines.append(f"\n  process {rank}: {len(differing) - 4} more")
    if lines:
        raise ValueError(
            f"{_WHERE} expected the same model, options and gradients in all "
            f"{len(everyone)} processes; got{''.join(lines)}\nRemedy: build the same model from "
            "the same seed everywhere and wrap it in DistributedDataParallel; for processes that "
            "train models of their own, CTROptimizer(..., process_group=None)."
        )


def _digest(*tensors: torch.Tensor | None) -> str:
    """Equal for equal tensors; enough to tell different ones apart."""
    sums = [None if t is None else float(t.detach().double().sum()) for t in tensors]
    return f"sums {sums}"
