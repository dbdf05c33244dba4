"""`CTROptimizer`: the engine as a `torch.optim.Optimizer`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch._compile import _disable_dynamo

from pyctrlora.attach import attach
from pyctrlora.pairing import Named, find_pairs, label, named_tensors
from pyctrlora.param_groups import (
    FALLBACK,
    VERSION,
    as_groups,
    check_numbers,
    params_of,
    warn_unused_lr,
)
from pyctrlora.rank_options import make_rank_options
from pyctrlora.reports import Reports
from pyctrlora.roster import Roster
from pyctrlora.saved_state import check_fits
from pyctrlora.stepping import take_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from typing_extensions import Self, Unpack

    from pyctrlora.options import EngineOptions
    from pyctrlora.processes import Group

_WHERE = "[pyctrlora.CTROptimizer]"


class CTROptimizer(Reports, torch.optim.Optimizer):
    """Curvature-whitened, trust-region steps for LoRA pairs; AdamW for everything else.

    Pairs are those `attach` or `LoRALinear` registered, else those that PEFT's parameter names
    tell. Each parameter group is split in two: a pair group (`kind="pairs"`) and a fallback group
    (`kind="fallback"`: heads, biases, norms, unsupported adapters), in this order. Both have `lr`,
    so every torch scheduler works; one that sets absolute values needs a list, one per group.
    Frozen parameters are left alone and join AdamW's once they require grad.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of them as in any torch optimizer. A dict
            may hold `lr` and `weight_decay` for its pairs and the `fallback_` keys for the rest.
        lr: the largest relative change of a layer's output in one step, >= 0, whatever
            rank and alpha: about ten times AdamW's best for the same adapters. 0.1 suits language
            models; where a fresh head is trained along, `head_radius` bounds what is too large. Use
            warm-up and decay as usual. At 0 nothing happens.
        fallback_lr: AdamW's learning rate, its usual default. A head's weight that is observed
            moves its outputs by `head_step` times it, whatever the width.
        weight_decay: decoupled decay of A and B, shrinking them by lr * weight_decay a step.
        fallback_betas: AdamW's.
        fallback_eps: AdamW's.
        fallback_weight_decay: AdamW's; 0, since heads and norms are rarely decayed.
        process_group: the processes that train this model together under DDP, which add up what
            they observe. "auto": torch.distributed's default group if it is initialised; a
            `ProcessGroup`; None: this process trains a model of its own.
        rank_budget: what the active directions of all pairs may cost, out_features + in_features
            each: a float is a share of the allocated parameters in (0, 1], an int a number of
            parameters; None (default): every direction stays active. Ranks come down to it
            (`rank_start`) and move to the layers where they are most useful. Twice the rank with
            half of the share has as many parameters and more layers' best directions among them.
        total_steps: length of the training, in which the schedule of ranks is measured: first event
            at 5 %, then every 2 % but at least 8 steps, last at 90 %.
        min_rank: least rank of a layer under a budget, >= 0. Default 1.
        rank_start: "full" (default): all directions at first, a cubic descent to the budget over
            the first quarter of the events, so that the directions which stay have been seen to
            learn; or "budget": down to it after the first step.
        **options: settings of the engine, by keyword: see `pyctrlora.options.EngineOptions`.

    Raises:
        ValueError: a number out of range; no parameter, or one twice; half a pair; a pair on two
            devices; a budget below min_rank's cost or above the allocation, or without total_steps.
        TypeError: integer, complex, sparse or sharded parameters; an unknown option.

    Example:
        >>> from torch import nn
        >>> from pyctrlora import add_lora
        >>> model = add_lora(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2)), rank=2)
        >>> opt = CTROptimizer(model.parameters(), lr=0.1)
        >>> for _ in range(3):
        ...     model(torch.ones(4, 8)).square().mean().backward()
        ...     opt.step()
        ...     opt.zero_grad()
        >>> opt.ranks()
        {'0': 2, '2': 2}
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        *,
        fallback_lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        fallback_betas: tuple[float, float] = (0.9, 0.999),
        fallback_eps: float = 1e-8,
        fallback_weight_decay: float = 0.0,
        process_group: Group = "auto",
        rank_budget: float | None = None,
        total_steps: int | None = None,
        min_rank: int = 1,
        rank_start: Literal["budget", "full"] = "full",
        **options: Unpack[EngineOptions],
    ) -> None:
        """See the class."""
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "fallback_lr": fallback_lr,
            "fallback_betas": fallback_betas,
            "fallback_eps": fallback_eps,
            "fallback_weight_decay": fallback_weight_decay,
        }
        check_numbers(defaults)
        self._roster = Roster(options, float(fallback_lr), process_group)
        super().__init__(as_groups(params), defaults)
        if not self._roster.pairs:
            warnings.warn(
                f"{_WHERE} found no LoRA pair among its parameters and trains all of them by "
                "AdamW. Remedy: pyctrlora.attach(model) first, CTROptimizer.from_model(model), or "
                "pass model.named_parameters().",
                UserWarning,
                stacklevel=2,
            )
        if rank_budget is not None:
            pairs = [pair for _, pair in self._roster.all_pairs()]
            ranks = make_rank_options(pairs, rank_budget, total_steps, min_rank, rank_start)
            self._roster.schedule_ranks(ranks)

    @classmethod
    def from_model(cls, model: nn.Module, adapter_name: str | None = None, **settings: Any) -> Self:
        """`attach(model, adapter_name)`, then the optimizer over its trainable parameters.

        Args:
            model: with PEFT's LoRA layers or `LoRALinear`.
            adapter_name: only pairs of this adapter; default: every trainable one.
            **settings: of the constructor.

        Raises:
            ValueError: no trainable LoRA layer, or as the constructor.

        Example:
            >>> from torch import nn
            >>> from pyctrlora import add_lora
            >>> model = add_lora(nn.Sequential(nn.Linear(8, 8)), rank=2)
            >>> CTROptimizer.from_model(model, lr=0.05).ranks()
            {'0': 2}
        """
        attach(model, adapter_name)
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return cls(trainable, **settings)

    @_disable_dynamo
    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, loss: Callable[[], Any] | None = None
    ) -> Any:
        """One step from the gradients in `.grad`, which are read and not written.

        `GradScaler.step(opt)` tells the loss scale by itself; then gradients are unscaled here, as
        `GradScaler.unscale_` does. Where that was called before, for clipping, the option
        `loss_scale` must tell it.

        Args:
            closure: runs forward and backward once and returns the loss. Where the option
                `ratio_every` asks for a check it runs again after the step, on the same random
                numbers; its gradients are thrown away then, and nothing is observed.
            loss: for such a check without a closure, or cheaper than by it: evaluates the loss of
                the batch that the gradients came from (under no_grad, before and after the step).

        Returns:
            The closure's loss (before the step), or None.
        """
        return take_step(self._roster, self, closure, loss)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Torch's protocol: `GradScaler.step` leaves scale and overflow to `step`."""
        return "loss_scale" not in self._roster.config

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients and what was observed while they were made.

        So the backward of a step that is skipped (an overflow under `GradScaler`, a loss spike)
        leaves nothing behind.

        Args:
            set_to_none: as in torch.
        """
        super().zero_grad(set_to_none)
        if not self._roster.again:  # else they are those of the step to come
            self._roster.engine.drop_observations()

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, at any time, as its pair group and its fallback group.

        Args:
            param_group: `params` and any of the constructor's numbers.

        Raises:
            ValueError: as the constructor.
            TypeError: as the constructor.
        """
        check_numbers(param_group)
        members = named_tensors(params_of(param_group))
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for name, tensor in members:
            if id(tensor) in known:
                raise ValueError(
                    f"{_WHERE} expected each parameter in one group; got {label(name, tensor)} in "
                    "a second one. Remedy: leave it out."
                )
        pairs = find_pairs(members, len(self._roster.all_pairs()))
        halves = {id(half) for pair in pairs for half in (pair.a, pair.b)}
        own = {k: v for k, v in param_group.items() if k not in ("params", "param_names", "kind")}
        chosen = {**self.defaults, **own}
        common = {k: v for k, v in chosen.items() if k not in FALLBACK.values()}
        if pairs:
            settings = {**common, "first_lr": float(chosen["lr"]), "kind": "pairs"}
            self._add_part([m for m in members if id(m[1]) in halves], settings)
            self._roster.add_pairs(pairs, len(self.param_groups) - 1)
        elif "lr" in own and "fallback_lr" not in own:
            warn_unused_lr(own["lr"], chosen["fallback_lr"])
        rest = [m for m in members if id(m[1]) not in halves]
        if rest:
            adamw = {key: chosen[source] for key, source in FALLBACK.items()}
            self._add_part(rest, {**common, **adamw, "kind": "fallback"})
            self._roster.add_others([tensor for _, tensor in rest], len(self.param_groups) - 1)

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state as plain types and tensors, loadable with `torch.load(weights_only=True)`.

        Beside torch's keys it holds "ctrlora": {"version", "steps", "tensors"}. The tensors are
        the engine's own, not copies.
        """
        # As hooks, so that the user's own see the section too.
        add = self._add_section
        handle = self.register_state_dict_post_hook(lambda _, state: add(state), prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state; the tensors keep their own dtypes. Training then goes on bit for bit.

        Args:
            state_dict: from an optimizer over the same pairs and parameters in the same groups.

        Raises:
            ValueError: it is another optimizer's, another version's, damaged, or does not fit;
                nothing has changed then.
            TypeError: one of its numbers is none.
        """
        load = self._load_section
        handle = self.register_load_state_dict_pre_hook(lambda _, state: load(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def follow_loss_scale(self, get_scale: Callable[[], float]) -> None:
        """Sets the option `loss_scale` after construction, unless the constructor was given one.

        Args:
            get_scale: read at each step, e.g. `GradScaler.get_scale`.
        """
        self._roster.config.setdefault("loss_scale", get_scale)

    def __getstate__(self) -> dict[str, Any]:
        """Torch's keys and the roster, which rebuilds its engine; hooks are not copied."""
        return {**super().__getstate__(), "_roster": self._roster}

    def _add_part(self, members: list[Named], settings: dict[str, Any]) -> None:
        params = [tensor if name is None else (name, tensor) for name, tensor in members]
        super().add_param_group({"params": params, **settings})
        for key in FALLBACK.values():  # defaults of the constructor, not of a part
            self.param_groups[-1].pop(key, None)

    def _add_section(self, state_dict: dict[str, Any]) -> None:
        engine = self._roster.engine
        section = {"version": VERSION, "steps": engine.steps(), "tensors": engine.named_tensors()}
        state_dict["ctrlora"] = section

    def _load_section(self, state_dict: dict[str, Any]) -> None:
        check_fits(self.param_groups, state_dict)
        if state_dict.get("ctrlora") is not None:
            self._roster.engine.load(state_dict["ctrlora"]["tensors"])
