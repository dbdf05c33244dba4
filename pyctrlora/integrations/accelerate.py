"""Accelerate: a loop of one's own over `accelerator.prepare`.

model, opt, loader = prepare(accelerator, model, CTROptimizer.from_model(model), loader)
...
log(accelerator, opt, step)
accelerator.save_state("run"); accelerator.load_state("run")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyctrlora.optimizer import CTROptimizer
from pyctrlora.writers import tagged

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare(accelerator: Accelerator, *things: Any) -> Any:
    """`accelerator.prepare(*things)`; every `CTROptimizer` among them follows the GradScaler.

    Accelerate passes an optimizer's state through `load_state_dict` here, which changes nothing:
    the engine's statistics keep their dtype.

    Args:
        accelerator: makes the GradScaler under `mixed_precision="fp16"`.
        *things: model, optimizer, loaders, schedulers, as for `accelerator.prepare`.

    Returns:
        As `accelerator.prepare`.
    """
    prepared = accelerator.prepare(*things)
    scaler = getattr(accelerator, "scaler", None)
    for thing in things:
        if isinstance(thing, CTROptimizer) and scaler is not None:
            thing.follow_loss_scale(scaler.get_scale)
    return prepared


def log(accelerator: Accelerator, optimizer: Any, step: int, **numbers: float) -> None:
    """`accelerator.log` of `optimizer.metrics()` under "ctrlora/" and of `numbers`.

    Args:
        accelerator: with `log_with` and `init_trackers` as usual.
        optimizer: a `CTROptimizer`, wrapped by Accelerate or not.
        step: of the run.
        **numbers: more to log, e.g. loss=...
    """
    own = getattr(optimizer, "optimizer", optimizer)
    accelerator.log({**numbers, **tagged(own.metrics())}, step=step)
