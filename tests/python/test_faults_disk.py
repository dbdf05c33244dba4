"""A disk that fills up in a save: a clear error, the old file as it was, nothing left behind."""

from __future__ import annotations

import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

import pyctrlora
from pyctrlora import CTROptimizer, checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails with EFBIG, in C++ and Rust, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def checkpoint_saver(model: Any, folder: Path) -> Callable[[], object]:
    opt = CTROptimizer.from_model(model)
    return lambda: checkpoint.save(folder / "run.pt", model=model, optimizer=opt, step=1)


def adapter_saver(model: Any, folder: Path) -> Callable[[], object]:
    return lambda: pyctrlora.save_adapter(model, folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["own", "peft"])
@pytest.mark.parametrize("saver", [checkpoint_saver, adapter_saver])
def test_a_full_disk_leaves_the_old_file(net, tmp_path, saver, kind, share):
    model = net(kind)
    save = saver(model, tmp_path)
    save()
    before = contents(tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    largest = max(len(content) for content in before.values())
    with pytest.raises(OSError, match=r"File too large|os error 27|write"):  # noqa: SIM117
        with files_of_at_most(int(share * largest)):
            save()
    assert contents(tmp_path) == before
    save()  # once there is room again
    assert contents(tmp_path).keys() == before.keys()
    assert contents(tmp_path) != before


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_full_disk_leaves_the_model_without_its_cache(net, batches, tmp_path, share):
    model = net("own")
    (x, y), *_ = batches(1, size=16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def init() -> None:
        def train_step() -> None:
            (model(x) - y).square().mean().backward()

        pyctrlora.cg_init(model, train_step, cache=tmp_path / "cache", progress=False)

    with pytest.raises(OSError, match=r"File too large|os error 27"):  # noqa: SIM117
        with files_of_at_most(int(share * 4096)):
            init()
    assert contents(tmp_path) == {}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    init()
    assert list(contents(tmp_path)) == ["cache"]
