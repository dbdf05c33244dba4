"""The text of `CTROptimizer.describe()`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyctrlora import _C
from pyctrlora.attach import skip_reason
from pyctrlora.pairing import label

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


def describe(
    groups: Sequence[dict[str, Any]],
    pairs: Sequence[tuple[int, _C.LoraPair]],
    frozen: Sequence[tuple[int, Tensor]],
    retired: Sequence[str],
) -> str:
    """What is trained how.

    Args:
        groups: the optimizer's.
        pairs: each with the index of its group.
        frozen: parameters that wait until they require grad, likewise.
        retired: names of the pairs that failed and went to AdamW.

    Returns:
        Lines to print: each group with its lr, pairs by shape, AdamW's tensors by name.
    """
    waiting = {id(tensor) for _, tensor in frozen}
    lines = []
    for index, group in enumerate(groups):
        if group["kind"] == "pairs":
            own = [pair for at, pair in pairs if at == index]
            lines.append(f"group {index}: {len(own)} LoRA pairs, lr {float(group['lr']):g}")
            lines += _pair_lines(own)
        else:
            lines += _fallback_lines(index, group, waiting)
    lines += [f"retired to AdamW after repeated failures: '{name}'" for name in retired]
    return "\n".join(lines)


def _pair_lines(pairs: Sequence[_C.LoraPair]) -> Iterator[str]:
    shapes: dict[tuple[int, int, int, bool], list[str]] = {}
    for pair in pairs:
        (rank, n), m = pair.a.shape, pair.b.shape[0]
        observed = _C.find_slot(pair.a) is not None
        shapes.setdefault((m, n, rank, observed), []).append(pair.name)
    for (m, n, rank, observed), names in shapes.items():
        how = "observed" if observed else "not observed, curvature from gradients"
        yield f"  {len(names)} of {m} x {n}, rank {rank}, {how}: {', '.join(names)}"


def _fallback_lines(index: int, group: dict[str, Any], waiting: set[int]) -> Iterator[str]:
    names = group.get("param_names", [None] * len(group["params"]))
    members = list(zip(names, group["params"], strict=True))
    live = [(name, t) for name, t in members if id(t) not in waiting]
    yield f"group {index}: {len(live)} parameters by AdamW, lr {float(group['lr']):g}"
    for name, tensor in live:
        reason = skip_reason(tensor)
        note = f", of LoRA layer {reason}" if reason else ""
        head = _C.find_head(tensor) is not None
        note += ", a head: steps by its outputs, bounds the pairs'" if head else ""
        yield f"  {label(name, tensor)}{note}"
    if len(live) < len(members):
        yield f"  {len(members) - len(live)} frozen ones left alone"
