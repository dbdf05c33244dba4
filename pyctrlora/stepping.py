"""What `CTROptimizer.step` does around the engine's step: closures and the ratio test."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pyctrlora import _C
from pyctrlora.param_groups import settings_of
from pyctrlora.scaling import settle_scale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from torch.optim import Optimizer

    from pyctrlora.roster import Roster


def take_step(
    roster: Roster,
    optimizer: Optimizer,
    closure: Callable[[], Any] | None,
    loss: Callable[[], Any] | None,
) -> Any:
    """One step, checked by the ratio test where one is due and the loss can be evaluated again.

    Args:
        roster: of the optimizer.
        optimizer: whose step it is.
        closure: see `CTROptimizer.step`.
        loss: see `CTROptimizer.step`.

    Returns:
        The closure's loss, or None.

    Raises:
        ValueError: as `Roster.before_step` and `settle_scale`.
        TypeError: `loss` is a value, which cannot be evaluated again.
    """
    if loss is not None and not callable(loss):
        raise TypeError(
            "[pyctrlora.CTROptimizer] expected loss as a function that evaluates it again; got "
            f"{type(loss).__name__}. Remedy: step(loss=lambda: loss_of(model(inputs), targets))."
        )
    engine = roster.engine
    params = [p for group in optimizer.param_groups for p in group["params"]]
    checked = engine.ratio_due() and not (closure is None and loss is None)
    probed = closure is not None and engine.probe_due()
    random = RandomState(params) if checked or probed else None
    value = None
    if closure is not None:
        with torch.enable_grad():
            value = closure()
    roster.adopt_thawed()
    roster.before_step()
    if not settle_scale(roster, optimizer, params):
        return value
    if probed and closure is not None and random is not None:
        _probe(roster, random, params, closure)
    if loss is not None and checked:
        random = RandomState(params)
    settings = [settings_of(group) for group in optimizer.param_groups]
    if not checked or random is None:
        engine.step(settings)
        return value
    again = closure if loss is None else loss
    assert again is not None
    before = value if loss is None else _evaluate(roster, random, params, again, grad=False)
    engine.begin_trial()
    engine.step(settings)
    after = _evaluate(roster, random, params, again, grad=loss is None)
    engine.end_trial(_number(before), after)
    return value


def _number(loss: Any) -> float:
    return float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss)


def _probe(
    roster: Roster, random: RandomState, params: list[Tensor], closure: Callable[[], Any]
) -> None:
    """One Hutchinson probe of all layers by two more evaluations of the closure."""
    engine = roster.engine
    pairs = [pair for _, pair in roster.all_pairs()]
    probe = _C.HutchinsonProbe(pairs, roster.config.get("seed", 0), engine.steps())
    try:
        for sign in (1, -1):
            probe.shift(sign)
            _evaluate(roster, random, params, closure, grad=True, then=probe.take)
    finally:
        probe.restore()
    engine.enter_traces({p.name: c for p, c in zip(pairs, probe.traces().tolist(), strict=True)})


def _evaluate(
    roster: Roster,
    random: RandomState,
    params: list[Tensor],
    loss: Callable[[], Any],
    *,
    grad: bool,
    then: Callable[[], None] = lambda: None,
) -> float:
    """The loss with the random numbers of `random`; leaves gradients and observations alone."""
    kept = [p.grad for p in params]
    roster.again = True
    roster.engine.observe(False)
    try:
        with random.again(), torch.set_grad_enabled(grad):
            if grad:  # the closure writes gradients of its own
                for p in params:
                    p.grad = None
            value = _number(loss())
            then()
            return value
    finally:
        if grad:
            for p, own in zip(params, kept, strict=True):
                p.grad = own
        roster.engine.observe(True)
        roster.again = False


class RandomState:
    """Torch's random generators as they are now, of the CPU and of the parameters' devices."""

    def __init__(self, params: list[Tensor]) -> None:
        """Reads them."""
        devices = {p.device for p in params if p.device.type not in ("cpu", "meta")}
        self.kind = next((device.type for device in devices), "cuda")
        self.devices = sorted({device.index or 0 for device in devices})
        self.cpu = torch.get_rng_state()
        module: Any = torch.get_device_module(self.kind) if devices else None
        self.module = module
        self.states = [module.get_rng_state(index) for index in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the numbers that came after this state come again; outside nothing is noticed."""
        with torch.random.fork_rng(self.devices, device_type=self.kind):
            torch.set_rng_state(self.cpu)
            for index, state in zip(self.devices, self.states, strict=True):
                self.module.set_rng_state(state, index)
            yield
