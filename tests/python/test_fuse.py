"""fuse and unfuse: PEFT's layers on the fused node."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import pyctrlora
from pyctrlora import _C, CTROptimizer, attach, fuse, unfuse

peft = pytest.importorskip("peft")
NAMES = [f"base_model.model.{name}" for name in ("first", "second", "third")]
NODE = "LoraFunction"  # in the name of the fused node


def fused_calls(model: nn.Module, x: Tensor) -> int:
    """How many fused nodes one forward makes."""
    seen, todo = set(), [model(x).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return sum(NODE in node.name() for node in seen)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input and of all trained parameters."""
    x = x.detach().clone().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    grads = torch.autograd.grad((y * weights).sum(), [x, *trained], allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if g is None else g for g in grads)]


def check_same(model: nn.Module, x: Tensor, nodes: int, tolerance: float = 1e-12) -> None:
    """The fused model does what it does unfused, by so many fused nodes."""
    fuse(model)
    assert fused_calls(model, x.detach().requires_grad_()) == nodes
    ours = results(model, x)
    unfuse(model)
    for mine, theirs in zip(ours, results(model, x), strict=True):
        assert mine.dtype is theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    fuse(model)


@pytest.fixture
def model(net):
    return net("peft")


@pytest.fixture
def x(batches):
    return batches(1)[0][0]


def counts(attachment: pyctrlora.Attachment) -> list[int]:
    return [_C.find_slot(pair.a).observations for pair in attachment.pairs]


def test_fuses_every_plain_layer_and_undoes_it(model, x):
    before = type(model.base_model.model.first)
    assert fuse(model) == NAMES == fuse(model)
    assert fused_calls(model, x) == 3
    assert "lora.FusedLinear(" in repr(model)
    unfuse(model)
    assert type(model.base_model.model.first) is before
    assert fused_calls(model, x) == 0
    unfuse(model)
    unfuse(nn.Linear(2, 2))


@pytest.mark.parametrize("bias", ["none", "thawed"])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 0, 6)])
def test_outputs_and_gradients_are_pefts(model, shape, bias):
    x = torch.randn(shape, dtype=torch.float64)
    if bias == "thawed":
        model.base_model.model.second.base_layer.bias.requires_grad_(True)
    check_same(model, x, 3 if bias == "none" else 2)


def test_a_base_without_bias_and_a_frozen_half(model, x):
    layer = model.base_model.model.first
    layer.base_layer.bias = None
    layer.lora_A["default"].weight.requires_grad_(False)
    check_same(model, x, 3)


def test_second_derivatives_are_pefts(model, x):
    penalties = []
    for change in (fuse, unfuse):
        change(model)
        inputs = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        trained = [inputs, *(p for p in model.parameters() if p.requires_grad)]
        penalties.append(torch.autograd.grad(slope.square().sum(), trained))
    for mine, theirs in zip(*penalties, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_conv1d(x):
    class Conv1D(nn.Module):  # transformers' layer, weight (in, out)
        def __init__(self) -> None:
            super().__init__()
            self.nf, self.nx = 4, 6
            self.weight = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
            self.bias = nn.Parameter(torch.randn(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    model = nn.Sequential(nn.Linear(6, 6).double())
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, model)
    model[0].base_layer = Conv1D().requires_grad_(False)
    model[0].lora_B["default"] = nn.Linear(2, 4, bias=False).double()
    check_same(model, x, 1)


def test_autocast(net, x):
    model = net("peft", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        check_same(model, x.float(), 3, tolerance=0.03)


def test_float32_adapter_over_a_sixteen_bit_base_stays_pefts(net, x):
    model = net("peft", dtype=torch.float32)
    for name in ("first", "second", "third"):
        model.base_model.model.get_submodule(name).base_layer.bfloat16()
    check_same(model, x.bfloat16(), 0, tolerance=0)
    with torch.autocast("cpu", torch.bfloat16):
        check_same(model, x.bfloat16(), 3, tolerance=0.03)


def test_what_is_not_plain_is_pefts(model, x):
    layer = model.base_model.model.first
    check_same(model, x, 3)
    with model.disable_adapter():
        check_same(model, x, 0)
    model.merge_adapter()
    check_same(model, x, 0)
    model.unmerge_adapter()
    handle = layer.base_layer.register_forward_hook(lambda _m, _a, out: out * 2)
    check_same(model, x, 2)
    handle.remove()
    handle = layer.lora_A["default"].register_forward_pre_hook(lambda _m, a: (a[0] * 2,))
    check_same(model, x, 2)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda _m, _a, _o: None)
    check_same(model, x, 0)
    handle.remove()
    layer.scaling["default"] = torch.tensor(0.5, dtype=torch.float64)
    check_same(model, x, 2)


def test_dropout_fuses_in_evaluation_only(net, x):
    model = net("peft", lora_dropout=0.5)
    fuse(model)
    assert fused_calls(model.train(), x) == 0
    check_same(model.eval(), x, 3)


def test_several_adapters(model, x):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["first", "second"]))
    for name, p in model.named_parameters():
        if "lora_B.other" in name:
            nn.init.normal_(p)
    check_same(model, x, 3)
    model.set_adapter("other")
    check_same(model, x, 2)
    model.base_model.set_adapter(["default", "other"])
    check_same(model, x, 1)  # the third layer has one of them only


def test_mixed_batches_are_pefts(model, x):
    names = ["default", "__base__"] * 2
    model.eval()
    expected = model(x, adapter_names=names)
    fuse(model)
    torch.testing.assert_close(model(x, adapter_names=names), expected, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model, x, reentrant):
    expected = results(model, x)
    fuse(model)
    model.base_model.model.reentrant = reentrant
    inputs = x.clone().requires_grad_()
    y = model(inputs)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    ours = [y.detach(), inputs.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Of the distinct storages that a forward keeps for its backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    tensors = []  # alive, so that no storage is counted as another one

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            tensors.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(kept.values())


def test_no_more_is_saved_than_by_peft(model, x):
    theirs = saved_bytes(model, x)
    fuse(model)
    assert saved_bytes(model, x) == theirs - 3 * 4 * 5 * 3 * 8  # x Aᵀ of three layers


# ---- observation ----


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_each_backward_counts_once_by_either_path(model, x, attach_first, reentrant):
    if attach_first:
        attachment = attach(model)
        fuse(model)
    else:
        fuse(model)
        attachment = attach(model)
    opt = CTROptimizer(model.parameters(), factor_warmup_steps=1000)
    model.base_model.model.reentrant = reentrant
    assert reentrant is not None or fused_calls(model, x) == 3
    for passes in (1, 2):  # the second one half fused
        model(x).square().sum().backward()
        assert counts(attachment) == [passes] * 3
        model.base_model.model.first.base_layer.register_forward_hook(lambda _m, _a, _o: None)
    model.base_model.model.reentrant = None
    with torch.no_grad():
        model(x)
    with model.disable_adapter():
        model(x.requires_grad_()).sum().backward()
    assert counts(attachment) == [2] * 3
    opt.step()


def test_training_is_that_of_unfused_layers(net, batches, train, products, same):
    changes = []
    for change in (fuse, lambda _model: None):
        model = net("peft")
        change(model)
        opt = CTROptimizer.from_model(model, factor_warmup_steps=2, factor_every=2)
        train(model, opt, batches(8))
        changes.append(products(opt))
    same(*changes, rtol=1e-9)


def test_parameters_that_peft_replaced_are_noticed(model, x):
    opt = CTROptimizer.from_model(model)
    fuse(model)
    layer = model.base_model.model.first
    layer.lora_A["default"] = nn.Linear(6, 3, bias=False).double()
    model(x).sum().backward()
    with pytest.raises(ValueError, match="new parameters"):
        opt.step()


# ---- copies, files, compilers ----


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_and_on_their_own(model, x, how):
    attachment = attach(model)
    fuse(model)
    CTROptimizer(model.parameters())
    twin = how(model)
    assert fused_calls(twin, x) == 3
    twin(x).sum().backward()
    assert counts(attachment) == [0] * 3
    first, its = model.base_model.model.first, twin.base_model.model.first
    with torch.no_grad():
        its.lora_B["default"].weight.zero_()
    assert torch.equal(its(x), its.base_layer(x))
    assert not torch.equal(first(x), its(x))


def test_saved_loaded_and_merged_by_peft(model, x, net, tmp_path):
    expected = model(x)
    keys = list(model.state_dict())
    fuse(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net("none"), tmp_path)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-12, atol=1e-12)
    torch.save(model.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
def test_a_compiled_model_is_observed_once(model, x):
    fuse(model)
    attachment = attach(model)
    opt = CTROptimizer(model.parameters(), factor_warmup_steps=1000)
    compiled = torch.compile(model, backend="eager")
    for passes in (1, 2):
        compiled(x).square().sum().backward()
        assert counts(attachment) == [passes] * 3
        opt.step()
        opt.zero_grad()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode
def test_compiled_and_transformed_models_are_pefts(model, x):
    expected = model(x)
    fuse(model)
    compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)
    rows = torch.func.vmap(model.base_model.model)(x)
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
    _, slope = torch.func.jvp(model.base_model.model, (x,), (x,))
    assert slope.shape == expected.shape
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangent = torch.autograd.forward_ad.unpack_dual(model.base_model.model(dual)).tangent
    torch.testing.assert_close(tangent, slope, rtol=1e-12, atol=1e-12)


# ---- errors ----


def test_errors_name_what_is_there(net):
    with pytest.raises(ValueError, match=r"\[pyctrlora\.fuse\] expected .*; got Net, which has no"):
        fuse(net("none"))
    with pytest.raises(ValueError, match=r"no layer is: 'base_model.model.first' \(DoraLinear"):
        fuse(net("peft", use_dora=True))


def test_layers_that_are_not_plain_are_left_alone(net, x):
    class Packed(nn.Linear):
        pass

    model = net("peft")
    layers = model.base_model.model
    layers.first.base_layer = Packed(6, 8).double().requires_grad_(False)
    layers.second.forward = layers.second.forward
    assert fuse(model) == NAMES[2:]
    assert fused_calls(model, x) == 1
