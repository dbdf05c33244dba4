"""Adapters as files: what is saved loads through PEFT with the same function."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import pyctrlora
from pyctrlora import CTROptimizer, attach, prepare_for_resume, save_adapter
from pyctrlora.adapters import adapter_layers

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")
RANKS = {"first": 1, "second": 3, "third": 2}


@pytest.fixture
def masked(net: Any, switch_off: Any) -> Any:
    def build(kind: str, ranks: dict[str, int] = RANKS, **config: Any) -> Any:
        model = net(kind, rank=4, alpha=6.0, **config)
        switch_off(model, ranks)
        return model

    return build


def loaded(net: Any, path: Any, **config: Any) -> Any:
    return peft.PeftModel.from_pretrained(net("none"), path, **config)


@pytest.mark.parametrize("kind", ["own", "peft"])
@pytest.mark.parametrize("layout", ["pattern", "uniform"])
@pytest.mark.parametrize("compacted", [False, True])
def test_loads_through_peft_with_equal_logits(
    masked, net, batches, tmp_path, kind, layout, compacted
):
    model = masked(kind)
    if compacted:
        pyctrlora.compact(model)
    x = batches(1)[0][0]
    expected = model(x).detach()
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    save_adapter(model, tmp_path / "deep" / "adapter", layout=layout)
    again = loaded(net, tmp_path / "deep" / "adapter")
    assert (again(x) - expected).abs().max() < 1e-6
    ranks = {layer.path: layer.rank for layer in adapter_layers(again)}
    assert ranks == (RANKS if layout == "pattern" else dict.fromkeys(RANKS, 3))
    assert {layer.scaling for layer in adapter_layers(again)} == {1.5}
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    if kind == "peft" and not compacted:
        assert model.peft_config["default"].rank_pattern == {}


def test_uniform_layout_has_one_rank_and_one_alpha_for_every_loader(masked, tmp_path):
    model = masked("peft", alpha_pattern={"first": 12.0})
    save_adapter(model, tmp_path, layout="uniform")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    for layer in adapter_layers(model):
        a, b = (tensors[f"base_model.model.{layer.path}.lora_{h}.weight"] for h in "AB")
        assert a.shape[0] == b.shape[1] == config["r"] == 3
        delta = config["lora_alpha"] / config["r"] * b @ a  # what a loader of one alpha computes
        assert torch.allclose(delta, layer.scaling * layer.b @ layer.a, atol=1e-6)


def test_rslora_and_patterns_survive(masked, net, batches, tmp_path):
    x = batches(1)[0][0]
    for layout in ("pattern", "uniform"):
        model = masked("peft", use_rslora=True, alpha_pattern={"second": 5.0})
        save_adapter(model, tmp_path / layout, layout=layout)
        assert (loaded(net, tmp_path / layout)(x) - model(x)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["own", "peft"])
@pytest.mark.parametrize("layout", ["pattern", "uniform"])
def test_rank_zero_is_saved_and_loaded(masked, net, batches, tmp_path, kind, layout):
    model = masked(kind, {"first": 0, "second": 2, "third": 2})
    x = batches(1)[0][0]
    save_adapter(model, tmp_path, layout=layout)
    assert (loaded(net, tmp_path)(x) - model(x)).abs().max() < 1e-6


def test_another_adapters_name_and_frozen_adapters(net, batches, tmp_path):
    model = net("peft", rank=4)
    other = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["first"], init_lora_weights=False)
    model.add_adapter("other", other)
    save_adapter(model, tmp_path, adapter_name="other")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    x = batches(1)[0][0]
    model.set_adapter("other")
    assert (loaded(net, tmp_path)(x) - model(x)).abs().max() < 1e-6


def test_paths_that_are_endings_of_others(tmp_path, switch_off):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})

        def forward(self, x: Any) -> Any:
            return self.inner["proj"](self.proj(x))

    torch.manual_seed(0)
    base = Nested()
    weights = {n: p.clone() for n, p in base.state_dict().items()}
    x = torch.randn(3, 4)
    for target in (r"inner\.proj|proj", "proj"):  # both layers; the outer one only
        model = Nested()
        model.load_state_dict(weights)
        pyctrlora.add_lora(model, rank=3, targets=[target] if "|" in target else r"(?!inner).*proj")
        for layer in adapter_layers(model):
            nn.init.normal_(layer.b)
        switch_off(model, {"proj": 1, "inner.proj": 3})
        save_adapter(model, tmp_path)
        fresh = Nested()
        fresh.load_state_dict(weights)
        again = peft.PeftModel.from_pretrained(fresh, tmp_path)
        assert (again(x) - model(x)).abs().max() < 1e-6


def test_resume_through_files(masked, net, batches, train, tmp_path, trained):
    model = masked("peft")
    save_adapter(model, tmp_path)
    fresh = net("peft", rank=4, alpha=6.0, seed=3)
    assert prepare_for_resume(fresh, tmp_path) == RANKS
    fresh.load_adapter(str(tmp_path), "default", is_trainable=True)  # as transformers' Trainer does
    attach(fresh)
    opt = CTROptimizer(fresh.parameters())
    assert sorted(opt.ranks().values()) == [1, 2, 3]
    x = batches(1)[0][0]
    values = trained(fresh)
    train(fresh, opt, batches(2))
    assert any(not torch.equal(values[n], p) for n, p in trained(fresh).items())
    assert torch.isfinite(fresh(x)).all()
    assert fresh.peft_config["default"].rank_pattern


def test_resume_names_what_differs(net, tmp_path):
    model = net("peft", rank=4)
    save_adapter(model, tmp_path)
    other = net("none")
    other.second = nn.Linear(8, 7)
    pyctrlora.add_lora(other, rank=2, targets=["first", "second"])
    with pytest.raises(ValueError, match="belongs to other layers") as error:
        prepare_for_resume(other, tmp_path)
    text = str(error.value)
    assert "only in the checkpoint: 'third'" in text
    assert "'second': expected A (r, 8) and B (7, r); got A (4, 8) and B (8, 4)" in text
    assert [layer.rank for layer in adapter_layers(other)] == [2, 2]
    with pytest.raises(FileNotFoundError, match="a folder with adapter_model"):
        prepare_for_resume(other, tmp_path / "nowhere")


def test_what_cannot_be_saved_is_named(net, tmp_path):
    model = net("peft", rank=4)
    with pytest.raises(ValueError, match="layout = 'dense'"):
        save_adapter(model, tmp_path, layout="dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="adapter 'other'"):
        save_adapter(model, tmp_path, adapter_name="other")
    with pytest.raises(TypeError, match="expected a PeftModel"):
        save_adapter(model.base_model.model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_files(masked, tmp_path, monkeypatch):
    model = masked("peft")
    save_adapter(model, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with torch.no_grad():
        model.base_model.model.first.lora_B["default"].weight.add_(1.0)

    def fails(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("peft.peft_model.safe_save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert model.peft_config["default"].rank_pattern == {}
