"""Which parameters of a group form pairs, and which go to AdamW."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyctrlora import _C
from pyctrlora.attach import skip_reason

if TYPE_CHECKING:
    from collections.abc import Iterable

_WHERE = "[pyctrlora.CTROptimizer]"
Named = tuple[str | None, Tensor]


def named_tensors(params: Any) -> list[Named]:
    """The tensors of one group, with their names where given; each checked.

    Raises:
        TypeError: not tensors, or tensors that cannot be trained.
        ValueError: none, a tensor twice, or only some with names.
    """
    if isinstance(params, set):
        raise TypeError(
            f"{_WHERE} expected ordered params; got a set, whose order changes between runs. "
            "Remedy: pass a list."
        )
    items = [params] if isinstance(params, Tensor) else list(params)
    members: list[Named] = [x if isinstance(x, tuple) else (None, x) for x in items]
    if not members:
        raise ValueError(
            f"{_WHERE} expected at least one parameter; got an empty list. Remedy: pass "
            "model.parameters() of a model with trainable parameters."
        )
    for name, tensor in members:
        _check(name, tensor)
    if len({name is None for name, _ in members}) > 1:
        raise ValueError(
            f"{_WHERE} expected names for all parameters or for none; got both. Remedy: pass "
            "model.named_parameters()."
        )
    counts = Counter(id(t) for _, t in members)
    twice = next((m for m in members if counts[id(m[1])] > 1), None)
    if twice is not None:
        raise ValueError(
            f"{_WHERE} expected each parameter once; got {label(*twice)} twice. Remedy: "
            "pass model.parameters(), which lists shared parameters once."
        )
    return members


def find_pairs(members: list[Named], number: int = 0) -> list[_C.LoraPair]:
    """The pairs among one group's tensors: registered ones, then by name what `attach` never saw.

    Args:
        members: names (or None) and tensors of the group.
        number: of pairs in earlier groups, for pairs without any name.

    Raises:
        ValueError: only one half of a pair is here, or its halves are on two devices.
    """
    here = {id(tensor) for _, tensor in members}
    pairs: list[_C.LoraPair] = []
    done: set[int] = set()
    rest: list[Named] = []
    for name, tensor in members:
        if id(tensor) in done:
            continue
        pair = _C.find_pair(tensor)
        if pair is None or pair.a.requires_grad != pair.b.requires_grad:
            rest.append((name, tensor))
            continue
        for half in (pair.a, pair.b):
            if id(half) not in here:
                _raise_half(pair.name or str(name), pair.a, pair.b, tensor)
        done.update((id(pair.a), id(pair.b)))
        pairs.append(_named_as(pair, name, number + len(pairs)))
    by_name = _pairs_by_name(rest)
    if by_name:
        warnings.warn(
            f"{_WHERE} {len(by_name)} pairs were found by their names only: their layers are not "
            "observed (curvature comes from the gradients alone) and their scaling is taken as 1. "
            "Remedy: pyctrlora.attach(model) before the optimizer is built.",
            UserWarning,
            stacklevel=2,
        )
    for pair in (*pairs, *by_name):
        _check_devices(pair)
    return pairs + by_name


def label(name: str | None, tensor: Tensor) -> str:
    """A tensor in messages: its name if it has one, and its shape."""
    return f"{name!r} {tuple(tensor.shape)}" if name else f"a tensor {tuple(tensor.shape)}"


def is_frozen(tensor: Tensor) -> bool:
    """Whether a model keeps this parameter from training for now."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _check(name: Any, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{_WHERE} expected tensors, (name, tensor) pairs or dicts of them; got "
            f"{torch.typename(tensor)}. Remedy: pass model.parameters()."
        )
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{_WHERE} expected (name, tensor) with a str; got {name!r} as name.")
    if is_frozen(tensor):
        return  # perhaps the packed or sharded weight of a base layer: left alone
    if hasattr(tensor, "device_mesh"):
        raise TypeError(
            f"{_WHERE} expected whole parameters; got {label(name, tensor)} sharded as a DTensor. "
            "Remedy: leave the adapters out of sharding (FSDP: ignored_params)."
        )
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{_WHERE} expected dense parameters; got {label(name, tensor)} with layout "
            f"{tensor.layout}. Remedy: train it with torch.optim.SparseAdam."
        )
    if not tensor.is_floating_point():
        raise TypeError(
            f"{_WHERE} expected real floating-point parameters; got {label(name, tensor)} of "
            f"{tensor.dtype}. Remedy: leave it out of params."
        )
    if not (tensor.is_leaf or tensor.retains_grad):
        raise ValueError(
            f"{_WHERE} expected leaf tensors; got {label(name, tensor)}, which is computed from "
            "others. Remedy: pass the parameters themselves."
        )


def _check_devices(pair: _C.LoraPair) -> None:
    if pair.a.device != pair.b.device:
        raise ValueError(
            f"{_WHERE} expected both halves of pair '{pair.name}' on one device; got lora_a "
            f"{tuple(pair.a.shape)} on {pair.a.device} and lora_b {tuple(pair.b.shape)} on "
            f"{pair.b.device}. Remedy: move the layer as a whole, before the optimizer is built."
        )


def _raise_half(name: str, a: Tensor | str, b: Tensor | str, got: Tensor | str) -> None:
    first, second, present = (
        half if isinstance(half, str) else str(tuple(half.shape)) for half in (a, b, got)
    )
    raise ValueError(
        f"{_WHERE} expected both halves of pair '{name}' in one parameter group: lora_a {first} "
        f"and lora_b {second}; got only {present}. Remedy: pass both in the same group; to train "
        "one alone, freeze the other and attach(model)."
    )


def _named_as(pair: _C.LoraPair, param_name: str | None, index: int) -> _C.LoraPair:
    """The pair under its own name, else its parameter's, else a number."""
    path = (param_name or "").rpartition(".lora_")[0]
    return _C.LoraPair(pair.a, pair.b, pair.scaling, pair.name or path or f"pair{index}")


def _pairs_by_name(members: Iterable[Named]) -> list[_C.LoraPair]:
    """PEFT's names, '<path>.lora_A.<adapter>.weight', where `attach` did not rule the layer out."""
    named = {f".{name}": t for name, t in members if name and skip_reason(t) is None}
    pairs = []
    for name, tensor in named.items():
        path, found, adapter = name.partition(".lora_A.")
        if not found:
            path, found, adapter = name.partition(".lora_B.")
        first, second = f"{path}.lora_A.{adapter}", f"{path}.lora_B.{adapter}"
        magnitude = f"{path}.lora_magnitude_vector.{adapter}"  # DoRA
        if not (found and tensor.requires_grad and tensor.dim() == 2) or magnitude in named:
            continue
        if first not in named or second not in named:
            _raise_half(path[1:], first[1:], second[1:], name[1:])
        if name == first and named[second].requires_grad:
            kind = adapter.removesuffix(".weight")
            full = path[1:] if kind == "default" else f"{path[1:]}.{kind}"
            pairs.append(_C.LoraPair(tensor, named[second], 1.0, full))
    return pairs
