"""`cg_init` refuses what cannot work, leaves the model as it was, and guards its cache."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import pyctrlora
from pyctrlora import _C, cg_init
from pyctrlora.observer import LayerObserver


@pytest.fixture
def step(batches):
    """`step(model)`: forward and backward on the next of ten batches; counts its calls."""

    def build(model: nn.Module, size: int = 16) -> Any:
        data = itertools.cycle(batches(10, size=size))

        def train_step() -> None:
            x, y = next(data)
            train_step.calls += 1
            (model(x) - y - 3 * x[..., :5]).square().sum(-1).mean().backward()

        train_step.calls = 0
        return train_step

    return build


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that `cg_init` promises to restore, with hooks and slots."""
    hooks = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    return {
        "values": {n: t.detach().clone() for n, t in model.state_dict().items()},
        "wants": {n: p.requires_grad for n, p in model.named_parameters()},
        "grads": {n: None if p.grad is None else id(p.grad) for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": hooks,
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    values = before.pop("values"), after.pop("values")
    assert before == after
    for name, value in values[0].items():
        assert torch.equal(value, values[1][name]), name


class BrokenError(Exception):
    pass


def raises_half_way(model: nn.Module, step: Any) -> None:
    if step.calls == 5:
        model.eval()
        raise BrokenError("stop")
    step()


def nan_half_way(model: nn.Module, step: Any) -> None:
    if step.calls == 5:
        model(torch.full((4, 5, 6), torch.nan, dtype=torch.float64)).sum().backward()
    step()


FAULTS = {
    "raises": (raises_half_way, BrokenError, "stop"),
    "nan": (nan_half_way, ValueError, "expected finite numbers; got NaN or inf among the inputs"),
    "no backward": (
        lambda model, step: model(torch.ones(2, 5, 6, dtype=torch.float64)),
        ValueError,
        r"expected train_step\(\) to run forward and backward .* no LoRA layer .* in batch 0",
    ),
    "nothing": (lambda model, step: None, ValueError, "no LoRA layer received a gradient"),
    "zero loss": (
        lambda model, step: (0 * model(torch.ones(2, 5, 6, dtype=torch.float64))).sum().backward(),
        ValueError,
        "expected gradients that are not zero; got none in any of the 3 layers",
    ),
    "few rows": (
        lambda model, step: (
            model(torch.ones(1, 6, dtype=torch.float64)).sum().backward() if step.calls else step()
        ),
        ValueError,
        "expected at least as many rows with a gradient as the rank, 7; got 6 for layer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["own", "peft"])
def test_faults_leave_the_model_as_it_was(kind, fault, net, step):
    model = net(kind, rank=7)
    model.train()
    next(iter(model.children())).eval()
    for number, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.grad = torch.ones_like(p) if number % 2 else None
    before = snapshot(model)
    action, error, message = FAULTS[fault]
    plain = step(model)
    with pytest.raises(error, match=message):
        cg_init(model, lambda: action(model, plain), progress=False)
    assert_same(before, snapshot(model))
    pyctrlora.attach(model)  # and it can be used again
    cg_init(model, plain, progress=False)


def test_success_restores_modes_flags_and_gradients(net, step):
    model = net("peft")
    model.eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    model.requires_grad_(True)
    before = snapshot(model)
    plain = step(model)
    cg_init(model, lambda: (model.train(), plain()), progress=False)
    after = snapshot(model)
    for part in ("wants", "grads", "modes"):
        assert before[part] == after[part]
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)


def test_an_observed_model_stays_observed_after_a_fault(net, step):
    model = net("peft")
    attachment = pyctrlora.attach(model)
    with pytest.raises(ValueError, match="no LoRA layer"):
        cg_init(model, lambda: None, progress=False)
    layers = [m for m in model.modules() if hasattr(m, "base_layer")]
    assert all(LayerObserver.of(layer).slots for layer in layers)
    assert all(_C.find_pair(pair.a) is not None for pair in attachment.pairs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": 3}, ValueError, "batches = 3. Violated constraint: batches >= 4"),
        ({"batches": 8.5}, TypeError, r"fitting type for batches; got 8\.5 of type float"),
        ({"mode": "shifted"}, ValueError, "mode = 'shifted'. Violated constraint: one of 'no_sh"),
        ({"init_radius": 0.0}, ValueError, "init_radius = 0. Violated"),
        ({"init_radius": 1.0}, ValueError, "init_radius = 1. Violated"),
        ({"whitening": -0.5}, ValueError, r"whitening = -0\.5\. Violated"),
        ({"damping": 0.0}, ValueError, "damping = 0. Violated"),
        ({"sketch_rank": 0}, ValueError, "sketch_rank = 0. Violated"),
        ({"probes": -1}, ValueError, "probes = -1. Violated"),
        ({"power": 2}, TypeError, "expected an option of InitOptions; got 'power'"),
    ],
)
def test_arguments_out_of_range(options, error, message, net, step):
    model = net("own")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        cg_init(model, step(model), progress=False, **options)
    assert_same(before, snapshot(model))


def test_a_model_without_plain_pairs(net, step):
    with pytest.raises(ValueError, match="expected a model with LoRA layers; got Linear"):
        cg_init(nn.Linear(3, 3), lambda: None)
    model = net("peft", use_dora=True)
    with (
        pytest.warns(UserWarning, match="no plain linear pairs"),
        pytest.raises(ValueError, match=r"expected plain LoRA layers; got 3, none of them: .*Dora"),
    ):
        cg_init(model, step(model), progress=False)


# ---- cache ----


def run(model: nn.Module, train_step: Any, cache: Any, **options: Any) -> pyctrlora.InitReport:
    return cg_init(model, train_step, cache=cache, progress=False, **options)


def test_cache_gives_the_same_bits_without_a_step(net, step, trained, same, tmp_path):
    path = tmp_path / "folder" / "statistics.safetensors"
    model, again, smaller = net("peft"), net("peft"), net("peft")
    first = run(model, step(model), path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary left
    plain = step(again)
    second = run(again, plain, str(path))
    assert plain.calls == 0
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.layers == second.layers
    same(trained(model), trained(again))
    third = run(smaller, plain, path, init_radius=0.001, mode="shift")
    assert [layer.radius for layer in third.layers] == pytest.approx([0.001] * 3)
    run(again, plain, path)  # of its own result: B does not matter
    same(trained(model), trained(again))


def test_cache_of_another_model_is_refused(net, step, tmp_path):
    path = tmp_path / "statistics.safetensors"
    model = net("own")
    run(model, step(model), path)
    other = net("own", seed=1)
    with pytest.raises(ValueError, match="was made for another model: its layers are the same"):
        run(other, step(other), path)
    narrow = net("own", rank=2)
    with pytest.raises(ValueError, match=r"expected a cache of this model with layers .*first"):
        run(narrow, step(narrow), path)
    with pytest.raises(ValueError, match=r"this model with settings .*\"whitening\": 1\.0"):
        run(model, step(model), path, whitening=1.0)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing tensor"])
def test_a_broken_cache_is_refused_and_the_model_kept(damage, net, step, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "statistics.safetensors"
    model = net("own")
    run(model, step(model), path)
    whole = path.read_bytes()
    if damage == "missing tensor":
        import safetensors as base

        with base.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = safetensors.load_file(path)
        del tensors["group0.rows"]
        safetensors.save_file(tensors, path, metadata=metadata)
    else:
        path.write_bytes(
            {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not tensors"}[damage]
        )
    before = snapshot(model)
    expected = "group0.rows is missing" if damage == "missing tensor" else "a whole safetensors"
    with pytest.raises(ValueError, match=expected):
        run(model, step(model), path)
    assert_same(before, snapshot(model))


def test_no_cache_is_left_by_a_fault(net, step, tmp_path):
    model = net("own")
    plain = step(model)
    with pytest.raises(BrokenError):
        run(model, lambda: raises_half_way(model, plain), tmp_path / "statistics.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_copies_of_a_model_are_separate(net, step, trained, same):
    model = net("own")
    twin = copy.deepcopy(model)
    before = trained(twin)
    cg_init(model, step(model), progress=False)
    same(trained(twin), before)
