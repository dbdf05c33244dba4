"""What strangers may hand to pyctrlora: states, checkpoints, adapters, caches, options.

Each target takes bytes, makes an input of them and gives it to the public API. Allowed is success,
after which a step must work and leave finite parameters, or an error that says where it comes from;
after an error nothing has changed. Anything else is a finding.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import pyctrlora
from pyctrlora import CTROptimizer, LoRALinear, checkpoint
from pyctrlora.init import InitOptions
from pyctrlora.options import EngineOptions

from .source import Source, other

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# ValueError and TypeError name the place; torch's own message for a number like 1e400 in a field
# of its C++ type starts with the field's name.
CLEAR = (ValueError, TypeError)
PLACES = ("[pyctrlora.", "[ctrlora::")


class FindingError(AssertionError):
    """An input did what none may."""


def model(seed: int = 0) -> nn.Module:
    """Two shapes of adapters and a head."""
    torch.manual_seed(seed)
    layers = [LoRALinear(nn.Linear(6, m), rank=2, name=f"l{i}") for i, m in enumerate((6, 6, 5))]
    for layer in layers:
        nn.init.normal_(layer.lora_b, std=0.3)
    net = nn.Sequential(*layers, nn.Linear(5, 3))
    pyctrlora.attach(net)  # the head is observed
    return net


def optimizer(net: nn.Module, **options: Any) -> Any:
    settings = {"sketch_rank": 3, "rank_budget": 0.5, "total_steps": 200, **options}
    return CTROptimizer(net.parameters(), **settings)


def step(net: nn.Module, opt: Any) -> None:
    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    opt.zero_grad()
    net(x).square().mean().backward()
    opt.step()


@cache
def trained() -> tuple[dict[str, Tensor], dict[str, Any], bytes]:
    """Parameters, state and checkpoint after a few steps."""
    net = model()
    opt = optimizer(net)
    for _ in range(6):
        step(net, opt)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.pt"
        checkpoint.save(file, model=net, optimizer=opt, step=6)
        return copy.deepcopy((net.state_dict(), opt.state_dict(), file.read_bytes()))


@contextlib.contextmanager
def refused_clearly(unchanged: Callable[[], object]) -> Iterator[list[str]]:
    """Errors that name their place pass, if nothing changed; others become findings.

    Yields a list that holds the message afterwards.
    """
    before, refused = unchanged(), list[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield refused
        except CLEAR as error:
            refused.append(str(error))
            if not str(error).startswith(PLACES):
                raise FindingError(f"unclear: {type(error).__name__}: {error}") from error
        except Exception as error:
            raise FindingError(f"unexpected: {type(error).__name__}: {error}") from error
    if refused and unchanged() != before:
        raise FindingError(f"refused, but changed something: {refused[0]}")


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in tensors.items()}


def everything(net: nn.Module, opt: Any) -> Callable[[], object]:
    """A function that reads parameters, numbers of groups and state."""

    def read() -> object:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
        state = opt.state_dict()["ctrlora"]["tensors"]
        return bits(net.state_dict()), repr(groups), bits(state)

    return read


def goes_on(net: nn.Module, opt: Any) -> None:
    numbers = [v for g in opt.param_groups for k, v in g.items() if k in ("lr", "weight_decay")]
    if max(map(float, numbers)) > 1e3:
        return  # AdamW takes the rest there, ours as torch's: its users' to choose
    for _ in range(2):
        step(net, opt)
    bad = [name for name, p in net.named_parameters() if not p.isfinite().all()]
    if bad:
        raise FindingError(f"accepted, then {bad} are not finite")


def _damage(source: Source, state: dict[str, Any]) -> None:
    """Some of a state's parts replaced, most often one tensor by a similar one."""
    for _ in range(1 + source.byte() % 3):
        tensors = state["ctrlora"]["tensors"] if _whole(state) else {}
        kind = source.byte() % 10
        if kind < 7 and tensors:
            name = source.pick(list(tensors))
            value = tensors[name]
            tensors[name] = other(source, value) if isinstance(value, Tensor) else value
        elif kind == 7 and tensors:
            tensors.pop(source.pick(list(tensors)))
            if source.byte() % 2:
                tensors[source.text()] = source.anything()
        elif kind == 8 and isinstance(state.get("param_groups"), list) and state["param_groups"]:
            group = source.pick(state["param_groups"])
            if isinstance(group, dict) and group:
                group[source.pick(list(group))] = source.anything()
        else:
            part = source.pick(["ctrlora", "param_groups", "state", "version", "tensors"])
            where = state if part in state else state.get("ctrlora")
            if isinstance(where, dict):
                where[part] = source.anything()


def _whole(state: dict[str, Any]) -> bool:
    section = state.get("ctrlora")
    return isinstance(section, dict) and isinstance(section.get("tensors"), dict)


def state(data: bytes) -> None:
    """`CTROptimizer.load_state_dict`."""
    source = Source(data)
    weights, saved, _ = trained()
    given = copy.deepcopy(saved)
    _damage(source, given)
    net = model()
    net.load_state_dict(weights)
    opt = optimizer(net)
    with refused_clearly(everything(net, opt)) as refused:
        opt.load_state_dict(given)
    with refused_clearly(lambda: None):
        if not refused:
            goes_on(net, opt)


def checkpoints(data: bytes) -> None:
    """`pyctrlora.checkpoint.load` of a file with some bytes changed, or of the bytes."""
    source = Source(data)
    file = bytearray(trained()[2])
    if source.byte() % 4:
        while source.more():
            at = int.from_bytes(source.take(3), "big") % len(file)
            file[at] = source.byte()
        if source.byte() % 8 == 1:
            del file[len(file) // 2 :]
    else:
        file = bytearray(source.rest())
    net = model(1)
    opt = optimizer(net)
    with tempfile.TemporaryDirectory() as folder, refused_clearly(everything(net, opt)) as refused:
        path = Path(folder) / "run.pt"
        path.write_bytes(file)
        checkpoint.load(path, model=net, optimizer=opt)
    with refused_clearly(lambda: None):
        if not refused:
            goes_on(net, opt)


@cache
def saved_adapter() -> tuple[bytes, dict[str, Any]]:
    net = model()
    with tempfile.TemporaryDirectory() as folder:
        pyctrlora.save_adapter(net, folder)
        weights, config = (
            Path(folder) / f"adapter_{n}" for n in ("model.safetensors", "config.json")
        )
        return weights.read_bytes(), json.loads(config.read_text("utf-8"))


def _changed_file(source: Source, whole: bytes) -> bytes:
    """A safetensors file: other tensors, other bytes, or only some bytes."""
    kind = source.byte() % 3
    if kind == 0:
        tensors = load(whole)
        name = source.pick(list(tensors))
        value = other(source, tensors.pop(name))
        if isinstance(value, Tensor) and value.device.type == "cpu" and not value.is_sparse:
            tensors[name if source.byte() % 4 else source.text()] = value.contiguous().clone()
        return bytes(save(tensors))
    if kind == 1:
        file = bytearray(whole)
        for _ in range(1 + source.byte() % 4):
            file[int.from_bytes(source.take(2), "big") % len(file)] = source.byte()
        return bytes(file[: len(file) - source.byte() % 3])
    return source.take(source.byte())


def adapter(data: bytes) -> None:
    """`prepare_for_resume` of a folder with an adapter's weights and config."""
    source = Source(data)
    weights, config = saved_adapter()
    if source.byte() % 2:
        weights = _changed_file(source, weights)
    changed: Any = dict(config)
    keys = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"]
    for _ in range(source.byte() % 3):
        changed[source.pick(keys)] = source.anything()
    text = json.dumps(changed, default=str).encode()
    kind = source.byte() % 4
    if kind == 0:
        text = json.dumps(source.anything(), default=str).encode()
    elif kind == 1:
        text = source.rest()
    net = model(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapter_model.safetensors").write_bytes(weights)
        (Path(folder) / "adapter_config.json").write_bytes(text)

        def unchanged() -> object:
            scalings = [m.scaling for m in net.modules() if isinstance(m, LoRALinear)]
            return bits(net.state_dict()), scalings

        with refused_clearly(unchanged):
            pyctrlora.prepare_for_resume(net, folder)


def _calibrate(net: nn.Module, file: Path) -> None:
    x = torch.linspace(-1, 1, 96).sin().reshape(16, 6)

    def train_step() -> None:
        net(x * (1 + torch.rand(16, 1))).square().mean().backward()

    pyctrlora.cg_init(net, train_step, batches=4, cache=file, progress=False)


@cache
def saved_cache() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cache.safetensors"
        _calibrate(model(), file)
        return file.read_bytes()


def _described(whole: bytes) -> dict[str, str]:
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    return dict(header["__metadata__"])


def calibration(data: bytes) -> None:
    """`cg_init(cache=...)`."""
    source = Source(data)
    file = saved_cache()
    if source.byte() % 2:
        file = _changed_file(source, file)
    else:  # past the description, into the statistics
        tensors = load(file)
        for _ in range(1 + source.byte() % 3):
            name = source.pick(list(tensors))
            value = other(source, tensors[name])
            if isinstance(value, Tensor) and value.device.type == "cpu" and not value.is_sparse:
                tensors[name] = value.contiguous().clone()
        file = bytes(save(tensors, metadata=_described(file)))
    net = model()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        path.write_bytes(file)
        with refused_clearly(lambda: bits(net.state_dict())) as refused:
            _calibrate(net, path)
    if not refused:
        bad = [name for name, p in net.named_parameters() if not p.isfinite().all()]
        if bad:
            raise FindingError(f"accepted, then {bad} are not finite")


CHOICES = ["tokens", "sequences", "mean", "sum", "rms", "radius", "newton", "inline", "thread"]


def _value(source: Source) -> Any:
    kind = source.byte() % 8
    if kind < 3:
        return source.pick([0.1, 0.5, 0.9, 1e-3, 1.0, 2.0])
    if kind < 5:
        return source.byte() % 6
    return source.pick(CHOICES) if kind == 5 else source.anything()


def options(data: bytes) -> None:
    """Keyword arguments of `CTROptimizer` and `cg_init`."""
    source = Source(data)
    of_init = source.byte() % 4 == 0
    own = [*(InitOptions if of_init else EngineOptions).__annotations__]
    own += ["batches", "init_radius", "mode"] if of_init else []
    own += ["lr", "fallback_lr", "weight_decay", "fallback_betas", "fallback_eps", "min_rank"] * (
        not of_init
    )
    own += [] if of_init else ["fallback_weight_decay", "rank_budget", "total_steps", "rank_start"]
    given = {source.pick(own): _value(source) for _ in range(1 + source.byte() % 4)}
    if any(isinstance(v, int) and v > 64 for v in given.values()) and of_init:
        return  # e.g. 2^31 batches are accepted, and take their time
    net = model()
    with refused_clearly(lambda: bits(net.state_dict())):
        if of_init:
            x = torch.linspace(-1, 1, 96).sin().reshape(16, 6)
            pyctrlora.cg_init(
                net, lambda: net(x).square().mean().backward(), progress=False, **given
            )
        else:
            opt = CTROptimizer(net.parameters(), **given)
            goes_on(net, opt)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "state": state,
    "checkpoint": checkpoints,
    "adapter": adapter,
    "cache": calibration,
    "options": options,
}
