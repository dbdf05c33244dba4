"""`cg_init`: what the modes do to model and function, on every kind of layer and backward."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import pyctrlora
from pyctrlora import _C, CTROptimizer, cg_init


@pytest.fixture
def steps(batches):
    """`steps(model)`: a train_step over ten batches, again and again."""

    def build(model: nn.Module, dtype: torch.dtype = torch.float64, cast: bool = False) -> Any:
        data = itertools.cycle(batches(10, size=16, dtype=dtype))

        def train_step() -> None:
            x, y = next(data)
            with torch.autocast("cpu", torch.bfloat16) if cast else torch.enable_grad():
                loss = (model(x) - y - 3 * x[..., :5]).square().sum(-1).mean()
            loss.backward()

        return train_step

    return build


def run(model: nn.Module, train_step: Any, **options: Any) -> pyctrlora.InitReport:
    return cg_init(model, train_step, **{"batches": 8, "progress": False, **options})


def outputs(model: nn.Module, batches: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    with torch.no_grad():
        return model(batches(1, dtype=dtype)[0][0])


def bare(model: nn.Module, batches: Any) -> Tensor:
    """Outputs with all adapters at zero."""
    kept = {}
    for name, p in model.named_parameters():
        if "lora_b" in name or "lora_B" in name:
            kept[name] = p.detach().clone()
            p.detach().zero_()
    y = outputs(model, batches)
    for name, p in model.named_parameters():
        if name in kept:
            p.detach().copy_(kept[name])
    return y


def loss_of(model: nn.Module, batches: Any) -> float:
    with torch.no_grad():
        return sum(
            float((model(x) - y - 3 * x[..., :5]).square().sum(-1).mean())
            for x, y in batches(10, size=16)
        )


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_no_shift_starts_downhill_by_the_radius(kind, net, steps, batches):
    model = net(kind)
    for name, p in model.named_parameters():
        if "lora_b" in name or "lora_B" in name:
            p.detach().zero_()
    before = loss_of(model, batches)
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    report = run(model, steps(model))
    assert loss_of(model, batches) < before
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert [layer.radius for layer in report.layers if layer.kept] == pytest.approx([0.01] * 3)
    larger = run(model, steps(model), init_radius=0.05)
    assert [layer.radius for layer in larger.layers] == pytest.approx([0.05] * 3)


def test_peft_and_own_layers_get_the_same(net, steps, trained):
    results = []
    for kind in ("own", "peft"):
        model = net(kind)
        run(model, steps(model))
        results.append(list(trained(model).values()))
    for own, pefts in zip(*results, strict=True):
        torch.testing.assert_close(own, pefts, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_shift_keeps_the_function_and_moves_the_base(kind, net, steps, batches):
    model = net(kind)
    before = bare(model, batches)
    run(model, steps(model), mode="shift")
    torch.testing.assert_close(outputs(model, batches), before, rtol=1e-12, atol=1e-12)
    assert (bare(model, batches) - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_zero_b_keeps_function_and_base(kind, net, steps, batches, trained):
    model, guided = net(kind), net(kind)
    before = bare(model, batches)
    report = run(model, steps(model), mode="zero_b")
    run(guided, steps(guided))
    assert torch.equal(outputs(model, batches), before)
    assert {layer.radius for layer in report.layers} == {0.0}
    for name, half in trained(model).items():
        if "lora_a" in name or "lora_A" in name:
            assert torch.equal(half, trained(guided)[name])


def test_old_values_of_the_adapters_do_not_matter(net, steps, trained, same):
    results = []
    for start in (0.0, 0.5):
        model = net("own", start=start)
        run(model, steps(model))
        results.append(trained(model))
    same(*results)


@pytest.mark.parametrize("kind", ["own", "peft"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(kind, reentrant, net, steps, trained, same):
    results, rows = [], []
    for mode in (None, reentrant):
        model = net(kind)
        (model.base_model.model if kind == "peft" else model).reentrant = mode
        report = run(model, steps(model))
        results.append(trained(model))
        rows.append([layer.rows for layer in report.layers])
    same(*results)
    assert rows == [[6 * 16 * 5] * 3] * 2


def test_autocast(net, steps, trained):
    results = []
    for autocast in (False, True):
        model = net("peft", dtype=torch.float32)
        report = run(model, steps(model, torch.float32, autocast))
        assert all(layer.kept == 3 for layer in report.layers)
        pairs = pyctrlora.attach(model).pairs
        results.append([(pair.b @ pair.a).detach() for pair in pairs])
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype == torch.float32
        assert float((plain * cast).sum() / plain.norm() / cast.norm()) > 0.98


class Packed(nn.Module):
    """A stand-in for a quantised layer: its weight is integers, and nobody may ask for it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.register_buffer("codes", (layer.weight.detach() * 100).round().to(torch.int8))

    @property
    def weight(self) -> Tensor:
        raise AssertionError("the packed weight was read")

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.to(x.dtype) / 100).T


def packed(net: Any, kind: str) -> nn.Module:
    model = net(kind)
    for layer in model.modules():
        for name in ("base", "base_layer"):
            if isinstance(getattr(layer, name, None), nn.Linear):
                setattr(layer, name, Packed(getattr(layer, name)))
    return model


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_quantised_bases(kind, net, steps, batches, tmp_path):
    model = packed(net, kind)
    run(model, steps(model), mode="zero_b")
    before = loss_of(model, batches)
    run(model, steps(model), cache=tmp_path / "statistics.safetensors")
    assert loss_of(model, batches) < before
    with pytest.raises(ValueError, match=r"layer '.*first' has a Packed as base, whose weight is"):
        run(model, steps(model), mode="shift")


def test_transformers_conv1d_is_shifted(batches):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = pyctrlora.add_lora(nn.Sequential(conv1d(7, 6), nn.Linear(7, 5)), rank=2).double()
    x, y = batches(1, size=40)[0]
    before = model(x).detach()
    run(model, lambda: (model(x) - y).square().sum(-1).mean().backward(), mode="shift")
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-9, atol=1e-9)


def test_an_optimizer_made_before_keeps_observing(net, steps, batches, train):
    model = net("peft")
    pyctrlora.attach(model)
    opt = CTROptimizer(model.parameters())
    run(model, steps(model))
    pairs = pyctrlora.attach(model).pairs
    seen = [_C.find_slot(pair.a).observations for pair in pairs]
    losses = train(model, opt, batches(1, size=16) * 10)
    assert losses[-1] < losses[0]
    assert [_C.find_slot(pair.a).observations for pair in pairs] > seen


def test_a_layer_without_gradient_keeps_its_adapter(net, steps, trained):
    model = net("own")
    model.spare = pyctrlora.LoRALinear(nn.Linear(4, 4), rank=3, name="spare")
    before = trained(model)
    report = run(model, steps(model))
    assert report["spare"].rows == 0
    assert torch.equal(model.spare.lora_a, before["spare.lora_a"])
    assert "spare" in str(report)
    assert "saw no gradient" in str(report)


def test_report(net, steps):
    model = net("own")
    report = run(model, steps(model))
    assert [layer.name for layer in report.layers] == ["first", "second", "third"]
    layer = report["first"]
    assert (layer.rank, layer.kept, layer.rows) == (3, 3, 480)
    assert list(layer.spectrum) == sorted(layer.spectrum, reverse=True)
    assert all(
        0 < half < full * 1.05 for half, full in zip(layer.split_half, layer.spectrum, strict=True)
    )
    assert 0 < layer.noise_floor < layer.spectrum[0]
    assert 0 < layer.energy_kept <= 1
    assert layer.effective_samples > 1
    table = str(report)
    assert table.splitlines()[0].split()[:2] == ["layer", "kept/rank"]
    assert "3 layers, mode no_shift, 8 batches" in table
    assert report.statistics_bytes > 0
    with pytest.raises(KeyError):
        report["fourth"]


def test_memory_is_told_once_and_a_bar_shown(net, steps, capsys, caplog):
    model = net("own")
    with caplog.at_level("INFO", logger="pyctrlora"):
        run(model, steps(model), progress=True)
    error = capsys.readouterr().err
    assert error.count("MiB of statistics for 3 layers") == 1
    assert "8/8" in error
    assert len(caplog.records) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_peft_adapters_do_not_run_while_they_add_nothing(fails, net, steps):
    model = net("peft")
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    active = [layer.active_adapter for layer in layers]
    calls: list[str] = []
    for layer in layers:
        layer.lora_A["default"].register_forward_hook(lambda *_: calls.append("A"))
    step = steps(model)

    def train_step() -> None:
        assert all(layer.active_adapters == [] for layer in layers)
        step()
        if fails:
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost") if fails else nullcontext():
        assert all(layer.kept for layer in run(model, train_step).layers)
    assert calls == []
    assert [layer.active_adapter for layer in layers] == active
    step()
    assert len(calls) == len(layers)


def test_another_active_adapter_stays_part_of_the_model(net, steps):
    """Only the adapter that is initialised is left out; the other one's outputs count."""
    trained = []
    for other in (False, True):
        model = net("peft")
        layers = [module for module in model.modules() if hasattr(module, "lora_A")]
        if other:
            model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["first", "second"]))
            model.base_model.set_adapter(["default", "other"])
            model.double()
            for layer in layers[:2]:
                layer.lora_B["other"].weight.detach().fill_(0.5)
        run(model, steps(model), adapter_name="default")
        trained.append(layers[1].lora_A["default"].weight.detach().clone())
    assert not torch.allclose(*trained)


def test_a_model_may_write_to_the_first_layers_output(steps):
    """Nothing before it asks for a gradient while its adapter does not run."""

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(6, 5, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x).mul_(2.0)

    torch.manual_seed(0)
    model = peft.get_peft_model(Writing(), peft.LoraConfig(r=2, target_modules=["proj"]))
    model.double()

    def train_step() -> None:
        x = torch.randn(16, 6, dtype=torch.float64)
        (model(x) - x[:, :5]).square().mean().backward()

    (layer,) = run(model, train_step).layers
    assert layer.kept > 0
