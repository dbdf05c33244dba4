"""The statistics of one calibration as a safetensors file."""

from __future__ import annotations

import hashlib
import json
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from pyctrlora.files import disk_errors, replacing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from pyctrlora import _C

_WHERE = "[pyctrlora.cg_init]"
_FORMAT = "pyctrlora.cg_init 1"
_SAMPLES = 64  # numbers of each tensor that enter the fingerprint


def description(
    model: nn.Module, pairs: Sequence[_C.LoraPair], settings: Mapping[str, Any]
) -> dict[str, str]:
    """What a cache must have been made for: settings, layers and the frozen model, as text."""
    layers = [[p.name, p.a.shape[1], p.b.shape[0], p.a.shape[0], str(p.a.dtype)] for p in pairs]
    return {
        "format": _FORMAT,
        "settings": json.dumps(dict(settings), sort_keys=True),
        "layers": json.dumps(layers),
        "model": _fingerprint(model, pairs),
    }


def save(path: Path, tensors: Mapping[str, Tensor], described: Mapping[str, str]) -> None:
    """Writes the file, which is whole or not there.

    Raises:
        OSError: the folder cannot be written to.
    """
    safetensors = _safetensors()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Copies: some are views of one storage, which safetensors refuses.
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with replacing(path) as temporary, disk_errors():
        safetensors.save_file(whole, temporary, metadata=dict(described))


def load(path: Path, described: Mapping[str, str]) -> dict[str, Tensor]:
    """Reads what `save` wrote.

    Raises:
        ValueError: no whole file of ours, or made for another model, other layers or settings.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{_WHERE} expected a whole safetensors file in cache={str(path)!r}; got: {error}. "
            "Remedy: delete the file; the next run writes it again."
        ) from error
    for part, expected in described.items():
        if found.get(part) != expected:
            raise ValueError(_differs(path, part, expected, found.get(part)))
    return tensors


def _differs(path: Path, part: str, expected: str, got: str | None) -> str:
    remedy = "Remedy: another file name, or delete the file; the next run writes it again."
    if part == "model":
        return (
            f"{_WHERE} cache={str(path)!r} was made for another model: its layers are the same, "
            f"but its frozen values differ. {remedy}"
        )
    return (
        f"{_WHERE} expected a cache of this model with {part} {_shorten(expected)}; "
        f"got {_shorten(str(got))} in {str(path)!r}. {remedy}"
    )


def _shorten(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def _fingerprint(model: nn.Module, pairs: Sequence[_C.LoraPair]) -> str:
    """Of names, shapes and some numbers of all tensors but the pairs'; reads no whole tensor."""
    own = {id(half) for pair in pairs for half in (pair.a, pair.b)}
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if id(tensor) in own:
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    try:
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu()
        return some.contiguous().view(torch.uint8).numpy().tobytes()
    except (RuntimeError, NotImplementedError, TypeError):
        return b""  # a packed or absent tensor without these operators: its shape must do


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{_WHERE} cache= needs safetensors. Remedy: pip install safetensors, or no cache."
        ) from error

    class Both:
        SafetensorError = safetensors.SafetensorError
        safe_open = safetensors.safe_open
        save_file = staticmethod(safetensors.torch.save_file)

    return Both
