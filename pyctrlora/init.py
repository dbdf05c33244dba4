"""Curvature-guided initialisation of LoRA adapters from a few calibration batches."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import torch

from pyctrlora import _C, init_cache
from pyctrlora.attach import Attachment, attach
from pyctrlora.init_report import InitReport, layer_reports
from pyctrlora.observer import bases_alone
from pyctrlora.shift import plain_bases

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn
    from typing_extensions import Unpack

Mode = Literal["no_shift", "shift", "zero_b"]
_WHERE = "[pyctrlora.cg_init]"
_logger = logging.getLogger("pyctrlora")


class InitOptions(TypedDict, total=False):
    """Further settings of `cg_init`.

    Attributes:
        whitening: exponent γ of the metric in [0, 1]. Default ½, as in `CTROptimizer`.
        damping: share of a factor's mean eigenvalue added to it, > 0. Default 0.01, as there.
        sketch_rank: eigenpairs kept per factor, >= 1. Default 16, as there.
        probes: columns of the gradient's sketch; fewer than the rank count as the rank. Default 0
            means 2·rank + 8: more finds weak directions better and takes more memory.
        deviations: a direction is kept if the halves of the batches agree on it by this many
            standard deviations of the noise, >= 0. Default 2.
        dense_limit: largest dimension that may get a complete basis, >= 1. Default 256.
        seed: of the probes and of the directions that fill up, >= 0. Default 0.
    """

    whitening: float
    damping: float
    sketch_rank: int
    probes: int
    deviations: float
    dense_limit: int
    seed: int


def cg_init(
    model: nn.Module,
    train_step: Callable[[], object],
    *,
    batches: int = 8,
    mode: Mode = "no_shift",
    init_radius: float = 0.01,
    cache: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    progress: bool = True,
    **options: Unpack[InitOptions],
) -> InitReport:
    """Sets A and B of every LoRA layer from the whitened gradient of a few batches.

    B·A becomes a small first step of rank r, the best one in the curvature's metric. Call it after
    the adapters were made, before the optimizer, DDP or `torch.compile`. Train or eval mode is the
    caller's choice; `requires_grad`, `.grad`, modes and observers are afterwards as before, and if
    anything is raised so are the parameters. Directions hidden by noise start at B = 0.

    Args:
        model: holds LoRA layers, PEFT's or `LoRALinear`; attached if it was not.
        train_step: runs forward and backward on the next calibration batch, without an optimizer
            step. Gradients are taken at B = 0.
        batches: calls of it, at least 4. Default 8.
        mode: "no_shift" (default): starts one guided step ahead. "shift": takes s·B·A out of the
            base weights, which keeps the function; not for quantised bases. "zero_b": A as above,
            B = 0: keeps function and base.
        init_radius: relative change of each layer's output by s·B·A, in (0, 1). Default 0.01.
        cache: safetensors file; if it exists the statistics come from it and `train_step` is not
            called, else they are written to it. `mode` and `init_radius` may differ between runs.
        adapter_name: only layers of this PEFT adapter; default: every trainable one.
        progress: whether to tell the memory needed and show a bar (if tqdm is installed).
        **options: see `InitOptions`.

    Raises:
        ValueError: an argument out of range; no LoRA layers; `train_step` has no backward, NaN, or
            fewer rows than a rank; the cache is broken or another model's.

    Example:
        >>> from pyctrlora import LoRALinear
        >>> model = LoRALinear(torch.nn.Linear(8, 4), rank=2)
        >>> step = lambda: model(torch.randn(16, 8)).square().mean().backward()
        >>> [layer.rank for layer in cg_init(model, step, progress=False).layers]
        [2]
    """
    start = time.perf_counter()
    settings = _settings(mode, {**options, "batches": batches, "init_radius": init_radius})
    attachment = attach(model, adapter_name)
    try:
        pairs = _linear_pairs(attachment)
        job = _Job(model, pairs, settings, None if cache is None else Path(cache), progress)
        bases = plain_bases(model, pairs) if mode == "shift" else []
        report, layers = job.run(train_step, start, mode)
    except BaseException:
        attachment.detach()
        raise
    for (weight, transposed), pair, layer in zip(bases, pairs, layers, strict=False):
        if layer.rows:
            _C.shift_base(weight, pair.a, pair.b, pair.scaling, transposed)
    return report


@dataclass(frozen=True)
class _Job:
    """One initialisation, its arguments checked."""

    model: nn.Module
    pairs: list[_C.LoraPair]
    settings: _C.CgInitOptions
    cache: Path | None
    progress: bool

    def run(
        self, train_step: Callable[[], object], start: float, mode: Mode
    ) -> tuple[InitReport, list[_C.LayerInit]]:
        """Statistics from the cache or by calibration, then the parameters."""
        described = self._description()
        read = self.cache is not None and self.cache.exists()
        statistics = _C.CgInit(self.pairs, self.settings)
        try:
            if self.cache is not None and read:
                statistics.load(init_cache.load(self.cache, described))
            else:
                _announce(statistics, len(self.pairs), self.progress)
                halves = [pair.a for pair in self.pairs]
                with _undisturbed(self.model, self.pairs), bases_alone(self.model, halves):
                    self._calibrate(statistics, train_step)
            layers = statistics.finish()
            if self.cache is not None and not read:
                init_cache.save(self.cache, statistics.named_tensors(), described)
            statistics.apply(layers)
        finally:
            statistics.release()
        return InitReport(
            layers=layer_reports(layers),
            mode=mode,
            batches=self.settings.batches,
            statistics_bytes=statistics.bytes(),
            seconds=time.perf_counter() - start,
            from_cache=read,
        ), layers

    def _description(self) -> dict[str, str]:
        if self.cache is None:
            return {}
        names = ("batches", *InitOptions.__annotations__)
        settings = {name: getattr(self.settings, name) for name in names}
        return init_cache.description(self.model, self.pairs, settings)

    def _calibrate(self, statistics: _C.CgInit, train_step: Callable[[], object]) -> None:
        for number in _with_bar(range(self.settings.batches), self.progress):
            with torch.enable_grad():
                train_step()
            if statistics.end_batch() == 0:
                raise ValueError(
                    f"{_WHERE} expected train_step() to run forward and backward through the "
                    f"model; no LoRA layer received a gradient in batch {number}. Remedy: call "
                    "loss.backward() in it, on this model, adapters enabled and not merged."
                )
            for pair in self.pairs:
                pair.b.grad = None


def _settings(mode: str, values: dict[str, Any]) -> _C.CgInitOptions:
    if mode not in get_args(Mode):
        raise ValueError(
            f"{_WHERE} mode = {mode!r}. Violated constraint: one of 'no_shift', 'shift', 'zero_b'."
        )
    settings = _C.CgInitOptions()
    settings.zero_b = mode == "zero_b"
    known = ("batches", "init_radius", *InitOptions.__annotations__)
    for name, value in values.items():
        if name not in known:
            raise TypeError(
                f"{_WHERE} expected an option of InitOptions; got {name!r}. Remedy: one of {known}."
            )
        try:
            setattr(settings, name, value)
        except TypeError:
            raise TypeError(
                f"{_WHERE} expected a number of fitting type for {name}; got {value!r} of type "
                f"{type(value).__name__}."
            ) from None
    settings.validate()
    return settings


def _linear_pairs(attachment: Attachment) -> list[_C.LoraPair]:
    if not attachment.pairs:
        raise ValueError(
            f"{_WHERE} expected plain LoRA layers; got {len(attachment.skipped)}, none of them: "
            f"{attachment.skipped}. Remedy: LoRA on linear layers, without DoRA."
        )
    return attachment.pairs


def _announce(statistics: _C.CgInit, layers: int, progress: bool) -> None:
    text = f"cg_init: {statistics.bytes() / 2**20:.1f} MiB of statistics for {layers} layers"
    _logger.info(text)
    if progress:
        sys.stderr.write(text + "\n")


def _with_bar(numbers: Iterable[int], progress: bool) -> Iterable[int]:
    if not progress:
        return numbers
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return numbers
    bar: Iterable[int] = tqdm(numbers, desc="cg_init", unit="batch")
    return bar


@contextmanager
def _undisturbed(model: nn.Module, pairs: Sequence[_C.LoraPair]) -> Iterator[None]:
    """Only the B halves want gradients inside; all flags and gradients come back afterwards."""
    wanted = {id(pair.b) for pair in pairs}
    halves = [half for pair in pairs for half in (pair.a, pair.b)]
    params = list({id(p): p for p in (*model.parameters(), *halves)}.values())
    before = [(p, p.requires_grad, p.grad) for p in params]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for p in params:
            p.grad = None
            if p.requires_grad:
                p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad)
            p.grad = grad
        for module, training in modes:
            module.training = training
