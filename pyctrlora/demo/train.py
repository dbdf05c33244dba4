"""Fine-tuning runs that differ in the optimizer only, AdamW's sweep, and their comparison."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import pyctrlora
from pyctrlora.demo.data import batches
from pyctrlora.demo.pretrain import mean_loss, token_loss, warm_up_and_decay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pyctrlora.demo.job import Job

ADAMW, CTR = "AdamW", "CTROptimizer"


@dataclass(frozen=True)
class Settings:
    """How to fine-tune.

    Attributes:
        steps: of each run; a multiple of `evaluations` puts the quarters on evaluated steps.
        batch: sequences a step.
        lr: CTROptimizer's: the largest relative change of a layer's output in a step.
        adamw_lrs: where AdamW's sweep begins; None takes the job's.
        seed: of the adapters' initial values and of the batches.
        evaluations: validation passes of a run beside the one before its first step.
        quick: AdamW runs once, with the second of its learning rates, instead of the sweep.
        budget: CTROptimizer's `rank_budget`; None keeps every direction.
        calibration: batches of `cg_init` before CTROptimizer's run; 0: an ordinary start.
        options: further ones of CTROptimizer.
    """

    steps: int = 120
    batch: int = 8
    lr: float = 0.1
    adamw_lrs: tuple[float, ...] | None = None
    seed: int = 0
    evaluations: int = 12
    quick: bool = False
    budget: float | None = None
    calibration: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One fine-tuning.

    Attributes:
        optimizer: "AdamW" or "CTROptimizer".
        lr: its peak learning rate.
        steps: steps after which the model was evaluated, 0 first.
        losses: validation loss there, nats per token; inf where it was not finite.
        seconds: training time up to there, evaluation left out.
        train_losses: of every step's batch.
        step_seconds: of every training step, forward to `zero_grad`.
        optimizer_seconds: of every `step()`.
        state_bytes: size of the optimizer's tensors at the end.
        start_seconds: of `cg_init`, part of `seconds`.
        spectra: by layer, singular values of the whitened gradient that `cg_init` found.
        noise_floors: by layer, what noise alone reaches in it.
        report: CTROptimizer's.
    """

    optimizer: str
    lr: float
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    state_bytes: int = 0
    start_seconds: float = 0.0
    spectra: dict[str, list[float]] = field(default_factory=dict)
    noise_floors: dict[str, float] = field(default_factory=dict)
    report: dict[str, Any] | None = None

    @property
    def final_loss(self) -> float:
        """Validation loss after the last step."""
        return self.losses[-1]

    def reaches(self, loss: float) -> tuple[float, float] | None:
        """(steps, seconds) at which the validation loss first falls to `loss`, or None.

        Between two evaluations the curve is taken as straight, which is late for a convex one.

        Example:
            >>> run = Run("AdamW", 0.01, steps=[0, 10], losses=[4.0, 2.0], seconds=[0.0, 5.0])
            >>> run.reaches(3.0)
            (5.0, 2.5)
        """
        for i, value in enumerate(self.losses):
            if value <= loss:
                if i == 0 or not math.isfinite(self.losses[i - 1]):
                    return float(self.steps[i]), self.seconds[i]
                part = (self.losses[i - 1] - loss) / (self.losses[i - 1] - value)
                between = [
                    axis[i - 1] + part * (axis[i] - axis[i - 1])
                    for axis in (self.steps, self.seconds)
                ]
                return between[0], between[1]
        return None


@dataclass
class Comparison:
    """AdamW's runs, one for each learning rate, against one of CTROptimizer.

    Attributes:
        settings: of all runs.
        sweep: AdamW's runs, by learning rate.
        ctr: CTROptimizer's run.
        model: what CTROptimizer trained.
    """

    settings: Settings
    sweep: list[Run]
    ctr: Run
    model: nn.Module

    @property
    def adamw(self) -> Run:
        """AdamW's run with the lowest final loss."""
        return min(self.sweep, key=lambda run: run.final_loss)

    @property
    def step_ratio(self) -> float | None:
        """CTROptimizer's steps to AdamW's final loss over AdamW's steps; None if never."""
        reached = self.ctr.reaches(self.adamw.final_loss)
        return None if reached is None else reached[0] / self.adamw.steps[-1]


def compare(job: Job, settings: Settings, say: Callable[[str], None] = print) -> Comparison:
    """Fine-tunes with AdamW at its best learning rate and with CTROptimizer.

    Both start from the same weights and see the same batches under the same schedule.

    Args:
        job: model and data.
        settings: lengths and learning rates.
        say: receives a line per run.
    """
    adamw = sweep(job, settings, say)
    ctr, model = fine_tune(job, settings, CTR, settings.lr)
    say(summary(ctr))
    return Comparison(settings, adamw, ctr, model)


def sweep(job: Job, settings: Settings, say: Callable[[str], None] = print) -> list[Run]:
    """Full AdamW runs over the learning rates, extended until the best one lies inside them."""
    lrs = settings.adamw_lrs or job.adamw_lrs
    runs: list[Run] = []

    def add(values: Iterable[float]) -> None:
        for lr in values:
            runs.append(fine_tune(job, settings, ADAMW, lr)[0])
            say(summary(runs[-1]))
        runs.sort(key=lambda run: run.lr)

    if settings.quick:
        add([lrs[min(1, len(lrs) - 1)]])
        return runs
    add(lrs)
    for _ in range(8):  # more cannot help: the rates are then far from any that trains LoRA
        best = min(runs, key=lambda run: run.final_loss)
        if best is runs[0]:
            add([best.lr * runs[0].lr / runs[1].lr])
        elif best is runs[-1]:
            add([best.lr * runs[-1].lr / runs[-2].lr])
        else:
            break
    return runs


def fine_tune(job: Job, settings: Settings, optimizer: str, lr: float) -> tuple[Run, nn.Module]:
    """One run of `optimizer` ("AdamW" or "CTROptimizer") at peak learning rate `lr`.

    Returns:
        The run and the trained model.
    """
    model = job.make(settings.seed)
    run = Run(optimizer, lr)
    if optimizer == CTR and settings.calibration > 0:
        _calibrate(run, job, model, settings)
    opt = _make_optimizer(model, optimizer, lr, settings)
    ramp = LambdaLR(opt, lambda i: warm_up_and_decay(i, settings.steps))
    data = batches(job.train, job.context, settings.batch, settings.steps, settings.seed)
    stops = {settings.steps * i // settings.evaluations for i in range(1, settings.evaluations + 1)}
    _evaluate(run, job, model)
    bar = tqdm(data, desc=f"{optimizer} lr {lr:g}", leave=False, disable=None)
    for step, tokens in enumerate(bar, start=1):
        began = time.perf_counter()
        loss = token_loss(job.logits(model, tokens[:, :-1]), tokens)
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        stepping = time.perf_counter()
        opt.step()
        run.optimizer_seconds.append(time.perf_counter() - stepping)
        ramp.step()
        opt.zero_grad()
        run.step_seconds.append(time.perf_counter() - began)
        run.train_losses.append(loss.item())
        if optimizer == CTR:
            opt.record(run.train_losses[-1])
        if step in stops:
            _evaluate(run, job, model)
            bar.set_postfix(validation=f"{run.final_loss:.3f}", refresh=False)
    run.state_bytes = sum(t.numel() * t.element_size() for t in _tensors(opt.state_dict()))
    if optimizer == CTR:
        run.report = opt.report()
    return run, model


def summary(run: Run) -> str:
    """One line on a finished run."""
    return (
        f"{run.optimizer} lr {run.lr:g}: validation loss {run.final_loss:.3f} after "
        f"{run.steps[-1]} steps, {run.seconds[-1]:.1f} s "
        f"({1e3 * median(run.step_seconds):.0f} ms a step)"
    )


def _make_optimizer(model: nn.Module, optimizer: str, lr: float, settings: Settings) -> Any:
    if optimizer == CTR:
        pyctrlora.attach(model)
        own = {"rank_budget": settings.budget, "total_steps": settings.steps, **settings.options}
        return pyctrlora.CTROptimizer(model.parameters(), lr=lr, **own)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0, fused=True)


def _calibrate(run: Run, job: Job, model: nn.Module, settings: Settings) -> None:
    count, seed = settings.calibration, settings.seed + 1000  # batches of its own
    data = iter(batches(job.train, job.context, settings.batch, count, seed))

    def train_step() -> None:
        tokens = next(data)
        loss = token_loss(job.logits(model, tokens[:, :-1]), tokens)
        loss.backward()  # type: ignore[no-untyped-call]  # of torch

    start = pyctrlora.cg_init(model, train_step, batches=settings.calibration)
    run.start_seconds = start.seconds
    run.spectra = {layer.name: list(layer.spectrum) for layer in start.layers}
    run.noise_floors = {layer.name: layer.noise_floor for layer in start.layers}


def _evaluate(run: Run, job: Job, model: nn.Module) -> None:
    model.eval()
    loss = mean_loss(lambda tokens: job.logits(model, tokens), job.validation)
    model.train()
    run.steps.append(len(run.step_seconds))
    run.losses.append(loss if math.isfinite(loss) else math.inf)
    run.seconds.append(run.start_seconds + sum(run.step_seconds))


def _tensors(state: object) -> Iterable[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)
