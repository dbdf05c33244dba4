"""Saving, loading and copying optimizers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pyctrlora import CTROptimizer, LoRALinear, add_lora

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def mixed(net: Any) -> Callable[[], nn.Module]:
    """`mixed()`: a Net of which the last layer is trained as it is."""

    def build() -> nn.Module:
        model: nn.Module = net("none")
        add_lora(model, rank=3, targets=["first", "second"])
        for module in (model.first, model.second):
            nn.init.normal_(module.lora_b, std=0.3)
        model.third.requires_grad_(True)
        return model

    return build


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def saved(opt: CTROptimizer) -> Any:
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"sketch_rank": 2, "sample_rows": 7, "balance_every": 4}])
def test_saved_and_loaded_training_goes_on_bit_for_bit(
    mixed, batches, train, trained, state, same, dtype, options
):
    data = batches(9, dtype=dtype)
    through = mixed().to(dtype)
    whole = CTROptimizer(through.parameters(), weight_decay=0.1, **options)
    train(through, whole, data)

    model = mixed().to(dtype)
    opt = CTROptimizer(model.parameters(), weight_decay=0.1, **options)
    train(model, opt, data[:5])
    weights, sd = copy.deepcopy(model.state_dict()), saved(opt)
    again = mixed().to(dtype)
    resumed = CTROptimizer(again.parameters(), weight_decay=0.1, **options)
    again.load_state_dict(weights)
    resumed.load_state_dict(sd)
    train(again, resumed, data[5:])
    same(trained(again), trained(through))
    same(state(resumed), state(whole))


def test_loading_keeps_dtypes(net, batches, train, state):
    model = net("own", dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    opt = CTROptimizer(model.parameters())
    train(model, opt, batches(2, dtype=torch.bfloat16))
    before = state(opt)
    opt.load_state_dict(saved(opt))
    after = state(opt)
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert before["group0.input.basis"].dtype is torch.float32


def test_parameters_do_not_share_a_storage(net, batches, train, tmp_path):
    """They are parts of slabs; libraries that look at storages must not take them for tied."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = net("own", rank=2)
    opt = CTROptimizer(model.parameters())
    for dtype in (torch.float64, torch.float32, torch.float64):
        model.to(dtype)
        train(model, opt, batches(1, dtype=dtype))
        halves = [pair_half for _, p in opt._roster.all_pairs() for pair_half in (p.a, p.b)]
        storages = [half.untyped_storage() for half in halves]
        assert len({s.data_ptr() for s in storages}) == 6
        assert all(s.nbytes() == half.nbytes for s, half in zip(storages, halves, strict=True))
    safetensors.save_model(model, tmp_path / "model.safetensors")
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["second.lora_b"], model.second.lora_b)
    kept = model.first.lora_a.data
    del opt, model  # the memory lives as long as any part of it
    assert kept.isfinite().all()


def test_accelerate_round_trip_keeps_the_state(net, batches, train, state, same):
    accelerate = pytest.importorskip("accelerate")
    model = net("own")
    opt = CTROptimizer(model.parameters())
    train(model, opt, batches(3))
    before = state(opt)
    _, wrapped = accelerate.Accelerator(cpu=True).prepare(model, opt)
    assert wrapped.optimizer is opt
    same(state(opt), before)
    train(model, wrapped, batches(1))
    assert opt.metrics()["steps"] == 4


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_model_and_optimizer_train_alike(
    mixed, batches, train, trained, state, same, how
):
    model = mixed()
    opt = CTROptimizer(trainable(model), lr=0.05, sketch_rank=3)
    train(model, opt, batches(3))
    twin, copied = how((model, opt))
    assert copied.param_groups[0]["params"][0] is twin.first.lora_a
    assert copied.defaults.items() >= opt.defaults.items()
    train(model, opt, batches(3))
    train(twin, copied, batches(3))
    same(trained(twin), trained(model))
    same(state(copied), state(opt))


def test_copy_of_the_optimizer_alone_leaves_the_original(net, batches, train, trained, same):
    model = net("own")
    opt = CTROptimizer(model.parameters())
    train(model, opt, batches(2))
    before = trained(model)
    copied = copy.deepcopy(opt)
    for group in copied.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    copied.step()
    same(trained(model), before)
    assert opt.metrics()["steps"] == 2
    assert copied.metrics()["steps"] == 3


@pytest.mark.filterwarnings("ignore:.*failed 1 times in a row; AdamW trains it:UserWarning")
def test_retired_layers_are_saved_and_loaded(net, batches, train, trained, state, same):
    def build() -> tuple[nn.Module, CTROptimizer]:
        model = net("own")
        return model, CTROptimizer(model.parameters(), max_misses=1, balance_every=2)

    model, opt = build()

    def collapse() -> None:  # the Gram of A = 0 has no Cholesky factor
        model.second.lora_a.data.zero_()

    train(model, opt, batches(1))
    train(model, opt, batches(3), collapse)
    assert "retired to AdamW after repeated failures: 'second'" in opt.describe()
    assert opt.metrics()["retired"] == 1
    again, resumed = build()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(saved(opt))
    twin, copied = copy.deepcopy((model, opt))
    for m, o in ((model, opt), (again, resumed), (twin, copied)):
        train(m, o, batches(3))
        assert o.metrics()["retired"] == 1
        same(trained(m), trained(model))
        same(state(o), state(opt))


def test_states_that_do_not_fit(net):
    opt = CTROptimizer(net("own").parameters())
    state = copy.deepcopy(opt.state_dict())
    one = LoRALinear(nn.Linear(6, 4), rank=2)
    foreign = torch.optim.AdamW([w := nn.Parameter(torch.ones(3))])
    w.sum().backward()
    foreign.step()
    with pytest.raises(
        ValueError, match="state dict of CTROptimizer; got one without the key 'ctrlora'"
    ):
        opt.load_state_dict(foreign.state_dict())
    with pytest.raises(ValueError, match="state dict of version 1; got 99"):
        opt.load_state_dict({**state, "ctrlora": {**state["ctrlora"], "version": 99}})
    with pytest.raises(ValueError, match=r"expected saved groups .*'pairs', 2.*; got .*'pairs', 6"):
        CTROptimizer([one.lora_a, one.lora_b]).load_state_dict(state)
    other = CTROptimizer(net("own", rank=2).parameters())
    with pytest.raises(
        ValueError, match=r"another set of layers or other options:\n.*momentum_a: exp"
    ):
        other.load_state_dict(state)
    without = {key: value for key, value in state.items() if key != "ctrlora"}
    with pytest.warns(
        UserWarning, match="no 'ctrlora' section: momenta, curvature and counters stay"
    ):
        opt.load_state_dict(without)
