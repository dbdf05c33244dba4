"""Checkpoints of a plain training loop: one file, whole at any time, resumed bit for bit."""

from __future__ import annotations

import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyctrlora.files import replacing

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from torch import Tensor, nn

_WHERE = "[pyctrlora.checkpoint]"
_PARTS = {"model", "optimizer", "rng", "step", "others"}
VERSION = 1  # of the file; the optimizer's section has its own


def save(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    **others: Any,
) -> None:
    """Writes a checkpoint to a temporary file beside `path`, syncs it and renames it to `path`.

    A process that dies at any moment leaves the old checkpoint or the new one, never half of one.

    Args:
        path: the file; its folder must exist.
        model: of which the trainable parameters and all buffers are kept. A frozen base is not: it
            comes back from where it came.
        optimizer: any torch optimizer.
        step: how many steps were taken.
        **others: things with a `state_dict()` (scheduler, GradScaler, sampler), or plain values.

    Raises:
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile, pyctrlora
        >>> model = pyctrlora.add_lora(torch.nn.Sequential(torch.nn.Linear(4, 4)), 2, targets=["0"])
        >>> opt = pyctrlora.CTROptimizer(model.parameters())
        >>> file = Path(tempfile.mkdtemp()) / "run.pt"
        >>> save(file, model=model, optimizer=opt, step=7, epoch=1)
        >>> load(file, model=model, optimizer=opt)
        {'step': 7, 'epoch': 1}
    """
    content = {
        "version": VERSION,
        "model": _kept(model),
        "optimizer": optimizer.state_dict(),
        "rng": _rng_state(),
        "step": step,
        "others": {name: _state_of(value) for name, value in others.items()},
    }
    with replacing(Path(path)) as temporary, temporary.open("wb") as file, _checksums():
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch closes its archive first, and fails once more
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    **others: Any,
) -> dict[str, Any]:
    """Restores what `save` wrote, together with torch's random state; tensors move by themselves.

    Args:
        path: the file.
        model: as it was when the optimizer was built.
        optimizer: over the same parameters.
        **others: the things with a `load_state_dict()` that were saved under these names.

    Returns:
        {"step": ...} and the plain values that were saved.

    Raises:
        ValueError: the file is damaged or of another version, or parameters differ; nothing was
            changed then.
    """
    content = _read(Path(path))
    if not isinstance(content, dict) or content.get("version") != VERSION:
        got = (
            content.get("version", "none") if isinstance(content, dict) else type(content).__name__
        )
        raise ValueError(
            f"{_WHERE} expected '{path}' to be a checkpoint of version {VERSION}; got {got}. "
            "Remedy: load it with the pyctrlora that wrote it."
        )
    absent = sorted(_PARTS - set(content))
    if absent or not isinstance(content["others"], dict) or not isinstance(content["model"], dict):
        raise _damaged(path, f"no {absent}" if absent else "parts of other types")
    missing = sorted(set(others) - set(content["others"]))
    if missing:
        raise ValueError(
            f"{_WHERE} expected {missing} in '{path}'; got {sorted(content['others'])}. Remedy: "
            "give load() the names that were given to save()."
        )
    kept = _kept(model)
    _check_same(kept, content["model"], path)
    _check_rng(content["rng"], path)
    optimizer.load_state_dict(content["optimizer"])  # checks all before it changes anything
    with torch.no_grad():
        for name, tensor in kept.items():
            tensor.copy_(content["model"][name])
    for name, value in others.items():
        value.load_state_dict(content["others"][name])
    _restore_rng(content["rng"])
    plain = {k: v for k, v in content["others"].items() if k not in others}
    return {"step": content["step"], **plain}


@contextmanager
def _checksums() -> Iterator[None]:
    """`load` compares them; torch writes them unless somebody has told it not to."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _read(path: Path) -> Any:
    """Torch tells of a damaged file by many kinds of exceptions; a missing one stays an OSError.

    Torch itself does not compare checksums: a changed bit would become a changed number.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"a wrong checksum of '{broken}'")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _damaged(path: Any, got: str) -> ValueError:
    return ValueError(
        f"{_WHERE} expected '{path}' to be a whole checkpoint; got {got[:300]}. Remedy: an older "
        "checkpoint; this file was changed after it was written."
    )


def _kept(model: nn.Module) -> dict[str, Tensor]:
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {**trained, **dict(model.named_buffers())}


def _state_of(value: Any) -> Any:
    return value.state_dict() if hasattr(value, "state_dict") else value


def _check_same(own: dict[str, Tensor], saved: dict[str, Tensor], path: Any) -> None:
    shapes = [{name: _shape(t) for name, t in side.items()} for side in (own, saved)]
    if shapes[0] == shapes[1]:
        return
    lines = [
        f"\n  {name}: expected {shapes[0].get(name, 'none')}; got {shapes[1].get(name, 'none')}"
        for name in sorted(own.keys() | saved.keys())
        if shapes[0].get(name) != shapes[1].get(name)
    ]
    raise ValueError(
        f"{_WHERE} '{path}' belongs to another model:{''.join(lines)}\nRemedy: build the model "
        "with the same adapters and ranks, and freeze what was frozen, before loading."
    )


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _check_rng(state: Any, path: Any) -> None:
    try:
        torch.Generator().set_state(state["cpu"])
        len(state["cuda"])
    except (RuntimeError, TypeError, KeyError) as error:
        raise _damaged(path, f"no random state: {error}") from error


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
