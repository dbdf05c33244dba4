"""An engine and what it was given, so that optimizers can be copied and pickled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from pyctrlora import _C, processes
from pyctrlora.observer import lost
from pyctrlora.options import make_options
from pyctrlora.pairing import is_frozen
from pyctrlora.rank_options import as_plain, from_plain, rebudget

if TYPE_CHECKING:
    from torch import Tensor

    from pyctrlora.options import EngineOptions
    from pyctrlora.processes import Group


_WHERE = "[pyctrlora.CTROptimizer]"
# Which roster's engine holds a pair: the one that took it last, whose slabs it is a view of.
_owners: Any = WeakTensorKeyDictionary()


class Roster:
    """The engine of one optimizer, with the index of the parameter group of each of its members.

    Attributes:
        engine: does all the work of a step.
        config: the options as the user gave them.
        pairs: the engine's pairs, call by call.
        adamw: the other parameters it trains, call by call.
        rank_options: the budget that its first pairs share, if any.
        rank_calls: how many calls of `pairs` those are.
        records: metrics of steps that the user asked to keep.
        frozen: parameters it has not got yet: frozen ones would only cost memory.
        again: whether the loss is being evaluated a second time, which leaves no trace.
        process_group: who trains this model together; see `pyctrlora.processes`.
    """

    def __init__(
        self, config: EngineOptions, fallback_lr: float, process_group: Group = "auto"
    ) -> None:
        """An engine without members; `fallback_lr` is for layers that fail repeatedly."""
        self.config = config
        self.fallback_lr = fallback_lr
        self.engine = _C.Engine(make_options(fallback_lr, **config))
        self.pairs: list[tuple[int, list[_C.LoraPair]]] = []
        self.adamw: list[tuple[int, list[Tensor]]] = []
        self.frozen: list[tuple[int, Tensor]] = []
        self.rank_options: _C.RankOptions | None = None
        self.rank_calls = 0
        self.records: list[dict[str, float]] = []
        self.process_group = process_group
        self.again = False
        self.token = object()
        self._joined: Any = None  # the group that the engine adds up over
        self._agreed = 0  # pairs that all processes were found to have
        self._join()

    def before_step(self) -> None:
        """Nothing may have been taken from us; all processes must have the same pairs.

        Raises:
            ValueError: layers have new parameters, another optimizer has them, or processes differ.
        """
        self._check_members()
        count = len(self.pairs)
        if count == self._agreed:
            return
        self._join()
        if self._joined is not None:
            others = [t for _, tensors in self.adamw for t in tensors]
            heads = [list(t.shape) for t in others if _C.find_head(t) is not None]
            processes.check_agreement(self.all_pairs(), heads, dict(self.config), self._joined)
        self._agreed = count

    def _check_members(self) -> None:
        if lost:
            gone = [f"'{p.name}' {lost[p.a]}" for _, p in self.all_pairs() if p.a in lost]
            if gone:
                raise ValueError(
                    f"{_WHERE} expected the layers' own parameters; got old ones, which nothing "
                    f"uses any more: {', '.join(gone)}. Remedy: attach(model) and build a new "
                    "optimizer after changing adapters."
                )
        for _, pairs in self.pairs:
            if _owners.get(pairs[0].a) is not self.token:
                raise ValueError(
                    f"{_WHERE} expected to be the only optimizer of its layers; got "
                    f"'{pairs[0].name}', which a CTROptimizer built later has taken over. Remedy: "
                    "step the newest one, or give each its own parameters."
                )

    def _join(self) -> None:
        """As early as possible: before anything is observed."""
        group = processes.usable(self.process_group)
        if group is not None and self._joined is None:
            self._joined = group
            processes.join(self.engine, group)

    def all_pairs(self) -> list[tuple[int, _C.LoraPair]]:
        """Every pair with the index of its parameter group."""
        return [(group, pair) for group, pairs in self.pairs for pair in pairs]

    def add_pairs(self, pairs: list[_C.LoraPair], group: int) -> None:
        """Hands pairs to the engine; a name that is taken gets a number."""
        taken = {pair.name for _, pair in self.all_pairs()}
        renamed = []
        for pair in pairs:
            name, copies = pair.name, 1
            while name in taken:
                copies += 1
                name = f"{pair.name}#{copies}"
            taken.add(name)
            renamed.append(_C.LoraPair(pair.a, pair.b, pair.scaling, name))
        self.engine.add_pairs(renamed, group)
        self._own(group, renamed)

    def _own(self, group: int, pairs: list[_C.LoraPair]) -> None:
        self.pairs.append((group, pairs))
        for pair in pairs:
            _owners[pair.a] = self.token

    def schedule_ranks(self, options: _C.RankOptions) -> None:
        """Puts the pairs that are here now under a budget."""
        self.engine.schedule_ranks(options)
        self.rank_options, self.rank_calls = options, len(self.pairs)

    def _rebuild(self) -> None:
        """A new engine over the members, without its state."""
        self.engine = _C.Engine(make_options(self.fallback_lr, **self.config))
        self._joined = None
        self._join()
        for call, (group, pairs) in enumerate(self.pairs, start=1):
            self.engine.add_pairs(pairs, group)
            if call == self.rank_calls and self.rank_options is not None:
                self.engine.schedule_ranks(self.rank_options)
        for group, tensors in self.adamw:
            self.engine.add_fallback(tensors, group)

    def add_others(self, tensors: list[Tensor], group: int) -> None:
        """Parameters for AdamW; frozen ones wait."""
        self.frozen += [(group, tensor) for tensor in tensors]
        self.adopt_thawed()

    def adopt_thawed(self) -> None:
        """Hands those to the engine that require grad by now."""
        thawed: dict[int, list[Tensor]] = {}
        for group, tensor in self.frozen:
            if not is_frozen(tensor):
                thawed.setdefault(group, []).append(tensor)
        if thawed:
            self.frozen = [(group, t) for group, t in self.frozen if is_frozen(t)]
        for group, tensors in thawed.items():
            self.engine.add_fallback(tensors, group)
            self.adamw.append((group, tensors))

    def detach_state(self) -> dict[str, Any]:
        """The engine's state and the order of its layers, before ranks change."""
        return {"tensors": self.engine.named_tensors(), "layout": self.engine.layout()}

    def attach_state(self, old: dict[str, Any], kept: dict[int, Tensor]) -> None:
        """A new engine over pairs whose ranks have changed, with the state of the old one.

        Args:
            old: from `detach_state`.
            kept: for each A (by id) that has shrunk, the directions that it kept.
        """
        if self.rank_options is not None:  # fewer parameters are allocated now
            self.rank_options = rebudget(
                self.rank_options, [p for _, pairs in self.pairs[: self.rank_calls] for p in pairs]
            )
        self._rebuild()
        by_name = {pair.name: kept.get(id(pair.a)) for _, pair in self.all_pairs()}
        self.engine.load(carry_over(old, self.engine, by_name))

    def __getstate__(self) -> dict[str, Any]:
        """Plain types and tensors; a pair says whether it is registered."""
        pairs = [
            (group, [(p.a, p.b, p.scaling, p.name, _C.find_slot(p.a) is not None) for p in pairs])
            for group, pairs in self.pairs
        ]
        # A group itself cannot be pickled; a copy finds the default one.
        group = None if self.process_group is None else "auto"
        own = {"config": self.config, "fallback_lr": self.fallback_lr, "process_group": group}
        members = {"pairs": pairs, "adamw": self.adamw, "frozen": self.frozen}
        ranks = {"ranks": as_plain(self.rank_options), "rank_calls": self.rank_calls}
        return {**own, **members, **ranks, "tensors": self.engine.named_tensors()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A new engine over the members in `state`, which may be copies."""
        Roster.__init__(self, state["config"], state["fallback_lr"], state["process_group"])
        for group, members in state["pairs"]:
            pairs = []
            for a, b, scaling, name, registered in members:
                pairs.append(_C.LoraPair(a, b, scaling, name))
                if registered:
                    _C.register_pair(pairs[-1])
            self._own(group, pairs)
        self.adamw = state["adamw"]
        self.rank_options, self.rank_calls = from_plain(state["ranks"]), state["rank_calls"]
        self._rebuild()
        self.frozen = state["frozen"]
        self.engine.load(state["tensors"])


def carry_over(
    old: dict[str, Any], engine: _C.Engine, kept: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """The old engine's state in the order and with the ranks of a new one.

    A layer's tensors differ in no dimension but the rank's, so those that differ are the rank's.
    """
    tensors: dict[str, Tensor] = old["tensors"]
    place = {
        name: (i, at) for i, names in enumerate(old["layout"]) for at, name in enumerate(names)
    }
    state = {key: value for key, value in tensors.items() if not key.startswith("group")}
    layout = engine.layout()
    for key, blank in engine.named_tensors().items():
        if not key.startswith("group"):
            continue
        head, _, part = key.partition(".")
        names = layout[int(head.removeprefix("group"))]
        if part == "age":
            state[key] = tensors[f"group{place[names[0]][0]}.{part}"]
        elif part.startswith("probe_"):  # blank: the Grams are measured anew
            state[key] = blank
        elif part == "share_set":  # their numbers are places in the old group: each on its own
            state[key] = torch.arange(len(names))
        else:
            rows = []
            for at, name in enumerate(names):
                i, row = place[name]
                rows.append(_shrunk(tensors[f"group{i}.{part}"][row], blank[at], kept[name]))
            state[key] = torch.stack(rows)
    return state


def _shrunk(value: Tensor, like: Tensor, kept: Tensor | None) -> Tensor:
    for dim, (old, new) in enumerate(zip(value.shape, like.shape, strict=True)):
        if kept is not None and old != new:
            value = value.index_select(dim, kept)
    return value
