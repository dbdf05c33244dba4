"""Options of the engine as keyword arguments of `CTROptimizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

from pyctrlora import _C

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Unpack


class EngineOptions(TypedDict, total=False):
    """Settings shared by all layers of one optimizer; `cpp/README.md` holds the equations.

    Attributes:
        curvature: "kfac" (default): from observed layers; "gradient": from the adapters' gradients
            alone, nothing is observed; "hutchinson": the direction is that of whitening 0, and the
            Fisher ball is measured by the traces of `hutchinson_every`.
        hutchinson_every: steps between two probes of the Hessian's trace, one number a layer, by
            two more evaluations of `step`'s closure, >= 0. `report()["curvature"]` compares them
            with the factors. Default 0: none.
        sketch_rank: eigenpairs kept per Kronecker factor, >= 1. Default 16: twice as
            many gain next to nothing.
        basis_dtype: "float32" (default; float64 for float64 parameters) or "bfloat16": how the
            factors' bases are kept. They are computed with in float32 either way; "bfloat16" halves
            what the state takes beyond the momentum.
        sample_rows: rows (tokens) of one backward that enter a factor, >= 1. Default 256:
            indistinguishable from all of them.
        factor_every: steps between two observations of a layer, >= 1. Default 1: the metric knows
            the batch whose gradient it meets. With 3 a step is cheaper, and refreshes can run
            beside training (`overlap`).
        exchange_every: the same under several processes, which send each other what they observe,
            >= 0. Default 0: as often as keeps that at 4.2 % of the gradients' bytes, which is 12
            to 14 for float32 adapters of rank `sketch_rank`. 1 trains best where the network is
            fast.
        factor_warmup_steps: first steps on which every layer is observed, >= 0. Default 5: the
            factors start from nothing.
        factor_beta: EMA weight of the old factor, in [0, 1). Default 0.6: LoRA
            moves the layers fast, and young factors fit better than the 0.95 of full K-FAC.
        damping: share of a factor's mean eigenvalue added to it, > 0. Default 0.01.
        whitening: exponent of the metric, in [0, 1]. 1: natural gradient; 0: no curvature. Default
            0.55, far better than 0.
        dense_limit: largest dimension that may get a complete basis, >= 1. Default 256.
        loss_terms: what the loss averages over: "tokens" (default), "sequences", or a number of
            terms. Matters for `kl_radius` only.
        loss_reduction: "mean" (default) or "sum": whether output gradients carry 1/terms.
        loss_scale: factor on the loss during backward, > 0; or a callable that returns it, read at
            each step. Default: what `GradScaler.step` tells, else 1. Needed where
            `GradScaler.unscale_` is called: `scaler.get_scale`. Gradients in `.grad` are taken as
            they are found then.
        beta1: momentum weight, in [0, 1). Default 0.6, better than 0.8 with
            this direction.
        gram_floor: relative floor of the rank-space Gram matrix, in (0, 1). Default 1e-4.
        kl_radius: radius of the global Fisher ball in nats per loss term, > 0. Default 0.005: it
            hardly matters at a good lr and bounds one that is too large. Summed over layers as if
            they were independent, which a step's are not: the true KL is another number, at a good
            lr a larger one.
        head_radius: largest relative change, to first order, of the outputs of a head that is
            trained along (a full linear layer behind the last adapter), in one step, > 0. Default
            0.3: holds the adapters back while a fresh head knows little, and bounds a too large lr
            later. Without such a head it does nothing. inf switches it off.
        head_step: how far a step of such a head's weight moves its outputs, as a multiple of
            `fallback_lr`, rms over rows and outputs, where gradients agree, >= 0. Default 100: 0.1
            at the default of 1e-3, whatever the head's width (by a rate of at most 1000 times
            `fallback_lr`). 0: AdamW's own length.
        rms_beta: EMA weight of the raw direction's squared length, in [0, 1). Default 0.7.
        step_length: "rms" (default): steps shrink where gradients are noise; "radius": every step
            fills the output ball; "newton": to the minimum of the curvature model along the
            direction, at most as far as "radius"; natural with whitening 1; needs a mean loss.
        curvature_decay: decoupled decay by curvature, >= 0: A and B also move by -lr *
            curvature_decay times the gradient of s^2 tr(PQ) / 2, stronger where the loss bends
            more. Default 0: none.
        ratio_every: steps between two that are checked by a second evaluation of the loss on their
            own batch, >= 0: radii follow the ratio of actual to predicted decrease, and a step that
            raises the loss is taken back. Needs `step(closure)` or `step(loss=...)`. Default 0:
            never.
        overlap: where factors are refreshed: "inline", "thread" (a worker thread), "stream" (a side
            stream of the device) or "auto" (default): "stream" on devices, "inline" on CPUs.
        max_staleness: steps that a refresh beside training may lag, 0 or 1 (default, which keeps a
            second copy of the factors); 0 waits for it: bit for bit as "inline".
        balance_every: steps between two balancings of the gauge, >= 1. Default 100.
        max_misses: failures of one layer in a row after which AdamW takes it over, >= 1. Default 5.
        maximize: ascend instead of descend. Default False.
        master_weights: steps on adapters of 16 bits are made on float32 copies, kept in the state,
            which are rounded into them. Default False: PEFT keeps adapters in float32.
        seed: of the row sampler and the first bases, >= 0. Default 0.
    """

    curvature: Literal["kfac", "gradient", "hutchinson"]
    hutchinson_every: int
    sketch_rank: int
    basis_dtype: Literal["float32", "bfloat16"]
    sample_rows: int
    factor_every: int
    exchange_every: int
    factor_warmup_steps: int
    factor_beta: float
    damping: float
    whitening: float
    dense_limit: int
    loss_terms: int | Literal["tokens", "sequences"]
    loss_reduction: Literal["mean", "sum"]
    loss_scale: float | Callable[[], float]
    beta1: float
    gram_floor: float
    kl_radius: float
    head_radius: float
    head_step: float
    rms_beta: float
    step_length: Literal["rms", "radius", "newton"]
    curvature_decay: float
    ratio_every: int
    overlap: Literal["inline", "thread", "stream", "auto"]
    max_staleness: Literal[0, 1]
    balance_every: int
    max_misses: int
    maximize: bool
    master_weights: bool
    seed: int


LOSS_TERMS = {"tokens": 0, "sequences": -1}


def make_options(fallback_lr: float, **options: Unpack[EngineOptions]) -> _C.Options:
    """The engine's options, checked.

    Args:
        fallback_lr: AdamW's learning rate for layers that fail repeatedly.
        **options: see `EngineOptions`.

    Raises:
        TypeError: an unknown option, or a value of the wrong type.
        ValueError: a value out of range.

    Example:
        >>> make_options(1e-3, loss_terms="sequences").loss_terms
        -1
    """
    made = _C.Options()
    made.fallback_lr = fallback_lr
    for name, value in options.items():
        if name not in EngineOptions.__annotations__:
            raise TypeError(
                f"[pyctrlora.CTROptimizer] expected an option of EngineOptions; got {name!r}. "
                f"Remedy: one of {', '.join(EngineOptions.__annotations__)}."
            )
        if name == "loss_scale" and callable(value):
            value = value()
        if name == "loss_terms" and isinstance(value, str):
            value = _terms(value)
        try:
            setattr(made, name, value)
        except TypeError:
            raise TypeError(
                f"[pyctrlora.CTROptimizer] expected {name} as in EngineOptions; got {value!r} of "
                f"type {type(value).__name__}. Remedy: leave it out for the default."
            ) from None
    made.validate()
    return made


def _terms(value: str) -> int:
    if value not in LOSS_TERMS:
        raise ValueError(
            f"[pyctrlora.CTROptimizer] loss_terms = {value!r}. Violated constraint: 'tokens', "
            "'sequences' or a number of terms >= 1."
        )
    return LOSS_TERMS[value]
