"""Ranks that really change: `compact` shrinks, `prepare_for_resume` follows a checkpoint."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyctrlora.adapters import (
    AdapterLayer,
    adapter_layers,
    parse_key,
    peft_config,
    write_patterns,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyctrlora.optimizer import CTROptimizer


_LARGEST_ALPHA = 1e6  # far above any in use; 1e308 would pass as a number and overflow a layer


@torch.no_grad()
def compact(model: nn.Module, opt: CTROptimizer | None = None) -> dict[str, int]:
    """Shrinks every adapter to its active directions, in the middle of training or after it.

    A direction is active unless its A row and its B column are both zero. The layer's function is
    the same to the last bit or two; scalings stay constant. Parameters keep their identity, so
    schedulers, hooks and param_groups go on; gradients are dropped. PEFT's `r`, `lora_alpha`,
    `scaling` and the config's `rank_pattern` and `alpha_pattern` are rewritten. A layer without any
    active direction keeps one zero direction, since PEFT knows no rank 0. Layers that are no plain
    linear pairs, and those that the optimizer handed to AdamW, keep their ranks.

    Args:
        model: with PEFT's LoRA layers or `LoRALinear`.
        opt: the optimizer that trains it: its pairs, slabs and state follow (momenta, curvature,
            counters). Without it, build a new one before training goes on.

    Returns:
        The rank of each layer by the name under which `opt.ranks()` lists it.

    Raises:
        RuntimeError: the model is compiled, or wrapped by DistributedDataParallel: both hold on to
            the old shapes.
        ValueError: the model has no LoRA layers, or `opt` trains none of them.

    Example:
        >>> from pyctrlora import CTROptimizer, add_lora
        >>> model = add_lora(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), rank=4)
        >>> with torch.no_grad():
        ...     model[0].lora_a[1:] = 0  # three directions off
        >>> opt = CTROptimizer(model.parameters())
        >>> compact(model, opt)
        {'0': 1, '1': 4}
        >>> model[0].lora_a.shape
        torch.Size([1, 8])
    """
    layers = adapter_layers(model)
    if not layers:
        raise ValueError(
            f"[pyctrlora.compact] expected a model with LoRA layers; got {type(model).__name__}, "
            "which has none."
        )
    _refuse_compiled(model)
    _refuse_ddp(model)
    retired: set[int] = set()
    if opt is not None:
        retired = _check_trained(layers, opt)
    _shrink(layers, opt, retired)
    _rewrite_configs(model, layers)
    return {layer.name: layer.rank for layer in layers if not layer.reason}


@torch.no_grad()
def prepare_for_resume(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Tensor],
    adapter_name: str = "default",
) -> dict[str, int]:
    """Brings a freshly built model to a checkpoint's ranks, so that its weights can be loaded.

    To be called before the weights are loaded and before the optimizer is built. The values of
    resized adapters are zero until then. Scalings are taken from the checkpoint's
    `adapter_config.json`, else they stay.

    Args:
        model: with PEFT's LoRA layers or `LoRALinear`, of any rank.
        checkpoint: a folder with `adapter_model.safetensors`, such a file, or a state dict (of the
            whole model or of its adapters).
        adapter_name: of PEFT's layers; files hold one adapter under no name.

    Returns:
        The rank of each layer by its path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: layers or their sizes differ, which the message lists; or a file is damaged.

    Example:
        >>> from pyctrlora import add_lora
        >>> build = lambda rank: add_lora(nn.Sequential(nn.Linear(8, 8)), rank=rank, alpha=2 * rank)
        >>> saved = build(3).state_dict()
        >>> model = build(8)
        >>> prepare_for_resume(model, saved)
        {'0': 3}
        >>> model.load_state_dict(saved)
        <All keys matched successfully>
    """
    tensors, config = _read(checkpoint)
    layers = [layer for layer in adapter_layers(model, adapter_name) if not layer.reason]
    shapes: dict[str, dict[str, torch.Size]] = {}
    for key, tensor in tensors.items():
        parsed = parse_key(key)
        if parsed is not None and parsed[2] in (None, adapter_name):
            shapes.setdefault(parsed[0], {})[parsed[1]] = tensor.shape
    difference = _difference(layers, shapes)
    if difference:
        raise ValueError(
            "[pyctrlora.prepare_for_resume] the checkpoint belongs to other layers:"
            + "".join(f"\n  {line}" for line in difference)
            + "\nRemedy: build the model with the adapters it was saved with."
        )
    for layer in layers:
        rank = shapes[layer.path]["a"][0]
        scaling = None if config is None else _scaling(config, layer.path, rank)
        if rank != layer.rank or (scaling is not None and scaling != layer.scaling):
            a, b = layer.a, layer.b
            layer.resize(a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank), scaling)
    _rewrite_configs(model, adapter_layers(model, adapter_name))
    return {layer.path: layer.rank for layer in layers}


def _shrink(layers: list[AdapterLayer], opt: CTROptimizer | None, retired: set[int]) -> None:
    shrinking: list[tuple[AdapterLayer, Tensor]] = []
    for layer in layers:
        if layer.reason or id(layer.a) in retired:
            continue
        active = layer.active()
        active[0] |= ~active.any()
        if not bool(active.all()):
            shrinking.append((layer, active.nonzero().squeeze(1)))
    kept = {id(layer.a): index for layer, index in shrinking}
    moving = opt._roster.detach_state() if opt is not None and shrinking else None
    for layer, index in shrinking:
        layer.resize(layer.a[index], layer.b[:, index])
    if opt is not None and moving is not None:
        opt._roster.attach_state(moving, kept)


def _refuse_compiled(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise RuntimeError(
                "[pyctrlora.compact] expected an eager model; got one compiled by torch.compile "
                f"(module '{path}'), whose graphs hold the old shapes. Remedy: compact the model "
                "before it is compiled, or the original after torch.compiler.reset(), and compile "
                "it anew."
            )


def _refuse_ddp(model: nn.Module) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    from torch.nn.parallel import DistributedDataParallel

    own = {id(p) for p in model.parameters()}
    # It may wrap the model from outside, where only the garbage collector knows of it.
    wrappers = [o for o in gc.get_objects() if type(o) is DistributedDataParallel]
    if any(id(p) in own for wrapper in wrappers for p in wrapper.parameters()):
        raise RuntimeError(
            "[pyctrlora.compact] expected a model outside DistributedDataParallel, whose gradient "
            "buckets hold the old shapes. Remedy: delete the wrapper, compact its module on every "
            "rank, and wrap it again."
        )


def _check_trained(layers: list[AdapterLayer], opt: CTROptimizer) -> set[int]:
    """Ids of the A's that AdamW trains, in an optimizer that trains some of these layers."""
    pairs = opt._roster.all_pairs()
    own = {id(layer.a) for layer in layers if not layer.reason}
    if not any(id(pair.a) in own for _, pair in pairs):
        raise ValueError(
            "[pyctrlora.compact] expected the optimizer that trains this model; got one that "
            f"trains none of its {len(own)} pairs. Remedy: pass the one that does, or none."
        )
    retired = set(opt._roster.engine.retired())
    return {id(pair.a) for _, pair in pairs if pair.name in retired}


def _rewrite_configs(model: nn.Module, layers: list[AdapterLayer]) -> None:
    for adapter in {layer.adapter for layer in layers if layer.adapter is not None}:
        config = peft_config(model, adapter)
        if config is not None:
            own = [layer for layer in layers if layer.adapter == adapter]
            write_patterns(config, own, {layer.path: layer.rank for layer in own})


def _read(
    checkpoint: str | Path | Mapping[str, Tensor],
) -> tuple[Mapping[str, Any], dict[str, Any] | None]:
    """Tensors by name, and PEFT's config if there is one beside them."""
    if not isinstance(checkpoint, str | Path):
        return checkpoint, None
    from safetensors import SafetensorError, safe_open

    path = Path(checkpoint)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"[pyctrlora.prepare_for_resume] expected a folder with adapter_model.safetensors or "
            f"such a file; got {str(checkpoint)!r}."
        )
    try:
        with safe_open(file, framework="pt") as reader:
            tensors = {key: _Shape(reader.get_slice(key).get_shape()) for key in reader.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(file, "a whole safetensors file", str(error)) from error
    beside = file.parent / "adapter_config.json"
    return tensors, _read_config(beside) if beside.is_file() else None


def _read_config(file: Path) -> dict[str, Any]:
    """PEFT's config, as far as scalings need it."""
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON
        raise _damaged(file, "JSON", str(error)) from error
    if not isinstance(config, dict):
        raise _damaged(file, "an object", type(config).__name__)
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise _damaged(file, "an object under 'alpha_pattern'", type(pattern).__name__)
    for alpha in (config.get("lora_alpha"), *pattern.values()):
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise _damaged(file, "numbers as lora_alpha", repr(alpha))
        if not abs(alpha) < _LARGEST_ALPHA:  # NaN, too
            raise _damaged(file, f"lora_alpha below {_LARGEST_ALPHA:g}", repr(alpha))
    for text in pattern:
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise _damaged(file, "regular expressions in 'alpha_pattern'", str(error)) from error
    return config


def _damaged(file: Path, expected: str, got: str) -> ValueError:
    return ValueError(
        f"[pyctrlora.prepare_for_resume] expected {expected} in '{file}'; got {got[:200]}. Remedy: "
        "save the adapter again; this file is damaged."
    )


class _Shape:
    """A tensor that was not read."""

    def __init__(self, shape: list[int]) -> None:
        self.shape = torch.Size(shape)


def _difference(layers: list[AdapterLayer], shapes: dict[str, dict[str, torch.Size]]) -> list[str]:
    here = {layer.path: layer for layer in layers}
    lines = [f"only in the checkpoint: '{path}'" for path in shapes if path not in here]
    for path, layer in here.items():
        found = shapes.get(path, {})
        if not found:
            lines.append(f"only in the model: '{path}'")
            continue
        n, m = layer.a.shape[1], layer.b.shape[0]
        a, b = (tuple(found.get(half, ())) for half in "ab")
        if len(a) != 2 or a[0] < 1 or a != (a[0], n) or b != (m, a[0]):
            lines.append(f"'{path}': expected A (r, {n}) and B ({m}, r); got A {a} and B {b}")
    return lines


def _scaling(config: dict[str, Any], path: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = own
            break
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
