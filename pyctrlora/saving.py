"""Adapters as files that PEFT and other loaders read: `save_adapter`."""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pyctrlora.adapters import (
    AdapterLayer,
    adapter_layers,
    parse_key,
    patterns,
    whole,
    write_patterns,
)
from pyctrlora.files import disk_errors
from pyctrlora.layers import is_conv1d

if TYPE_CHECKING:
    from collections.abc import Mapping

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    path: str | Path,
    layout: Literal["pattern", "uniform"] = "pattern",
    adapter_name: str = "default",
) -> None:
    """Saves an adapter in PEFT's format, with its active directions only.

    `PeftModel.from_pretrained(base, path)` gives the same function, also for `LoRALinear` models.
    Files are written beside their place and moved there, so a reader never sees half a file.

    Args:
        model: a `PeftModel`, or any module with `LoRALinear` layers.
        path: the folder to write to; made if it is missing.
        layout: "pattern": every layer has its own rank, told by `rank_pattern` and `alpha_pattern`;
            the smallest file. "uniform": ranks are padded with zeros to the largest and scalings
            folded into B, for loaders that know one r and one alpha only (vLLM, llama.cpp).
        adapter_name: which of PEFT's adapters. It lies in `path` itself, under no name.

    Raises:
        ValueError: no such adapter; an unknown layout; layers that are no plain linear pairs and
            have another rank or scaling than a uniform layout would give them.
        TypeError: PEFT layers outside a `PeftModel`.
        OSError: the folder cannot be written, or is full; the old files stay.

    Example:
        >>> import os, tempfile
        >>> from pyctrlora import add_lora
        >>> model = add_lora(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if layout not in ("pattern", "uniform"):
        raise ValueError(
            f"[pyctrlora.save_adapter] layout = {layout!r}. Violated constraint: 'pattern' or "
            "'uniform'."
        )
    layers = adapter_layers(model, adapter_name)
    if not layers:
        raise ValueError(
            f"[pyctrlora.save_adapter] expected a model with LoRA layers of adapter "
            f"{adapter_name!r}; got {type(model).__name__}, which has none."
        )
    ranks, scaling, values = _values(layers, layout)
    own = [layer for layer in layers if layer.adapter is None]
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as folder, disk_errors():
        if len(own) == len(layers):
            _write_own(model, own, Path(folder), ranks, scaling, values)
        else:
            _write_peft(model, layers, Path(folder), ranks, scaling, values, adapter_name)
        _move(Path(folder), target)


def _values(
    layers: list[AdapterLayer], layout: str
) -> tuple[dict[str, int], float | None, dict[tuple[str, str], Tensor]]:
    """Ranks by path, the one scaling of a uniform layout, and the halves to write."""
    plain = [layer for layer in layers if not layer.reason]
    halves, ranks = {}, {layer.path: layer.rank for layer in layers}
    for layer in plain:
        active = layer.active()
        active[0] |= ~active.any()  # PEFT knows no rank 0: one zero direction
        halves[layer.path] = layer.a.detach()[active], layer.b.detach()[:, active]
        ranks[layer.path] = halves[layer.path][0].shape[0]
    scaling = None
    if layout == "uniform":
        largest = max(ranks.values())
        scaling = max(layers, key=lambda layer: ranks[layer.path]).scaling
        _refuse_unequal(layers, largest, scaling)
        for layer in plain:
            a, b = halves[layer.path]
            more = largest - a.shape[0]
            a = torch.cat([a, a.new_zeros(more, a.shape[1])])
            b = torch.cat([b, b.new_zeros(b.shape[0], more)], 1)
            halves[layer.path] = a, b * (layer.scaling / scaling)
        ranks = dict.fromkeys(ranks, largest)
    values = {}
    for path, (a, b) in halves.items():
        values[path, "a"], values[path, "b"] = a.cpu().contiguous(), b.cpu().contiguous()
    return ranks, scaling, values


def _refuse_unequal(layers: list[AdapterLayer], rank: int, scaling: float) -> None:
    for layer in layers:
        if layer.reason and (layer.rank, layer.scaling) != (rank, scaling):
            raise ValueError(
                f"[pyctrlora.save_adapter] expected plain linear pairs for layout 'uniform'; got "
                f"'{layer.name}' ({layer.reason}) with rank {layer.rank} and scaling "
                f"{layer.scaling:g}, where all would have rank {rank} and scaling {scaling:g}. "
                "Remedy: layout='pattern'."
            )


def _write_peft(
    model: Any,
    layers: list[AdapterLayer],
    folder: Path,
    ranks: Mapping[str, int],
    scaling: float | None,
    values: Mapping[tuple[str, str], Tensor],
    adapter: str,
) -> None:
    """By PEFT's own writer, from a state dict with other values and a config with other ranks."""
    if not (hasattr(model, "save_pretrained") and hasattr(model, "active_peft_config")):
        raise TypeError(
            f"[pyctrlora.save_adapter] expected a PeftModel or LoRALinear layers; got PEFT layers "
            f"in a {type(model).__name__}. Remedy: pass the object that get_peft_model returned."
        )
    tensors = dict(model.state_dict())
    for key in tensors:
        parsed = parse_key(key)
        if parsed is not None and parsed[2] == adapter and parsed[:2] in values:
            tensors[key] = values[parsed[:2]]
    config = model.peft_config[adapter]
    changed = copy.deepcopy(config)
    if scaling is None:
        write_patterns(changed, layers, ranks)
    else:
        rank = max(ranks.values())
        changed.r, changed.lora_alpha = rank, whole(scaling * rank)
        changed.rank_pattern, changed.alpha_pattern, changed.use_rslora = {}, {}, False
    model.peft_config[adapter] = changed
    try:
        model.save_pretrained(str(folder), state_dict=tensors, selected_adapters=[adapter])
    finally:
        model.peft_config[adapter] = config
    if adapter != "default":  # PEFT makes a folder of its name
        _move(folder / adapter, folder)
        shutil.rmtree(folder / adapter)


def _write_own(
    model: nn.Module,
    layers: list[AdapterLayer],
    folder: Path,
    ranks: Mapping[str, int],
    scaling: float | None,
    values: Mapping[tuple[str, str], Tensor],
) -> None:
    """`LoRALinear` layers as PEFT would have saved them."""
    from safetensors.torch import save_file

    tensors = {
        f"base_model.model.{path}.lora_{half.upper()}.weight": tensor
        for (path, half), tensor in values.items()
    }
    rank, alpha, rank_pattern, alpha_pattern = patterns(layers, ranks)
    if scaling is not None:
        alpha, alpha_pattern = whole(scaling * rank), {}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": any(is_conv1d(layer.layer.base) for layer in layers),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": _targets(model, [layer.path for layer in layers]),
    }
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _targets(model: nn.Module, paths: list[str]) -> list[str] | str:
    """The paths, which PEFT takes as endings; as one expression where an ending is ambiguous."""
    others = {path for path, _ in model.named_modules()} - set(paths)
    if any(other.endswith(f".{path}") for other in others for path in paths):
        return "|".join(re.escape(path) for path in paths)
    return sorted(paths)


def _move(source: Path, target: Path) -> None:
    """Files to their place, weights last but for the config, which tells a loader to look."""
    files = [entry for entry in source.iterdir() if entry.is_file()]
    for file in sorted(files, key=lambda f: (f.name == _CONFIG, f.name == _WEIGHTS)):
        file.replace(target / file.name)
