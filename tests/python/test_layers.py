"""LoRALinear and add_lora."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pyctrlora
from pyctrlora import _C, LoRALinear, add_lora


class Conv1D(nn.Module):
    """transformers' layer, weight (in, out); recognised by name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Packed(nn.Module):
    """A stand-in for a quantised layer: its weight is integers, and nobody may ask for it."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer(
            "codes", torch.randint(-8, 8, (out_features, in_features)).to(torch.int8)
        )
        self.register_buffer("scale", torch.full((), 0.1, dtype=torch.float64))

    @property
    def weight(self) -> Tensor:
        raise AssertionError("the packed weight was read")

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes * self.scale).to(x.dtype).T


def with_b(layer: LoRALinear) -> LoRALinear:
    nn.init.normal_(layer.lora_b)
    return layer


def plain(layer: LoRALinear, x: Tensor) -> Tensor:
    return layer.base(x) + layer.scaling * (x @ layer.lora_a.T @ layer.lora_b.T)


def bases() -> dict[str, nn.Module]:
    return {
        "linear": nn.Linear(6, 4).double(),
        "no bias": nn.Linear(6, 4, bias=False).double(),
        "conv1d": Conv1D(4, 6).double(),
        "packed": Packed(4, 6),
    }


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d", "packed"])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 0, 6)])
def test_forward_and_gradients_are_those_of_plain_torch(kind, shape):
    layer = with_b(LoRALinear(bases()[kind], rank=2, alpha=5.0))
    x = torch.randn(shape, dtype=torch.float64)
    weights = torch.randn(*shape[:-1], 4, dtype=torch.float64)
    results = []
    for function in (layer, lambda z: plain(layer, z)):
        inputs = x.clone().requires_grad_()
        out = function(inputs)
        tensors = (inputs, layer.lora_a, layer.lora_b)
        results.append([out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)])
    for fused, reference in zip(*results, strict=True):
        torch.testing.assert_close(fused, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "packed"])
def test_gradcheck(kind):
    layer = with_b(LoRALinear(bases()[kind], rank=2))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def function(inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if kind == "packed":
            return _C.lora_delta(inputs, layer.base(inputs), a, b, 0.7, None)
        weight, bias = layer.base.weight, layer.base.bias
        return _C.lora_linear(inputs, weight, bias, a, b, 0.7, None, kind == "conv1d")

    assert torch.autograd.gradcheck(function, (x, layer.lora_a, layer.lora_b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_base_gets_a_float32_adapter(dtype):
    layer = with_b(LoRALinear(nn.Linear(6, 4).to(dtype), rank=2))
    assert layer.lora_a.dtype is layer.lora_b.dtype is torch.float32
    x = torch.randn(3, 6, dtype=dtype)
    out = layer(x)
    assert out.dtype is dtype
    expected = layer.base(x).float() + layer.scaling * (x.float() @ layer.lora_a.T @ layer.lora_b.T)
    torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.03)
    out.sum().backward()
    assert layer.lora_a.grad.dtype is torch.float32


def test_autocast_computes_in_its_dtype():
    layer = with_b(LoRALinear(nn.Linear(6, 4), rank=2))
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), plain(layer, x), rtol=0.03, atol=0.03)
    out.float().sum().backward()
    assert layer.lora_b.grad.dtype is torch.float32


def test_start_is_the_base_and_the_base_is_frozen():
    base = nn.Linear(6, 4)
    x = torch.randn(3, 6)
    before = base(x)
    layer = LoRALinear(base, rank=2, alpha=8)
    assert torch.equal(layer(x), before)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]
    assert layer.scaling == 4.0
    assert (
        layer.lora_a.abs().max() <= 1 / 6**0.5
    )  # Kaiming-uniform with a = sqrt(5): bound 1/sqrt(n)
    assert "rank=2, scaling=4" in repr(layer)


def test_equals_peft(net):
    own, theirs = net("own"), net("peft")
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(own(x), theirs(x), rtol=1e-12, atol=1e-12)
    own(x).square().sum().backward()
    theirs(x).square().sum().backward()
    grads = [[p.grad for p in m.parameters() if p.requires_grad] for m in (own, theirs)]
    for mine, their in zip(*grads, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-12, atol=1e-12)


def test_registers_itself_under_its_name():
    layer = LoRALinear(nn.Linear(6, 4), rank=2, alpha=6, name="here")
    pair = _C.find_pair(layer.lora_b)
    assert pair.a is layer.lora_a
    assert (pair.name, pair.scaling) == ("here", 3.0)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_their_own_pair(how):
    layer = LoRALinear(nn.Linear(6, 4), rank=2, name="here")
    twin = how(layer)
    pair = _C.find_pair(twin.lora_a)
    assert pair.b is twin.lora_b
    assert twin.lora_a is not layer.lora_a
    assert _C.find_slot(twin.lora_a) is not _C.find_slot(layer.lora_a)
    x = torch.randn(3, 6)
    assert torch.equal(twin(x), layer(x))


def test_new_parameters_are_registered_at_the_next_forward():
    layer = LoRALinear(nn.Linear(6, 4), rank=2, name="here")
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert _C.find_pair(layer.lora_a) is None
    layer(torch.zeros(1, 6))
    assert _C.find_pair(layer.lora_a).b is layer.lora_b


def test_add_lora_spares_the_head_and_freezes_the_rest(net):
    model = nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "lm_head": nn.Linear(4, 9)}
    )
    assert add_lora(model, rank=2) is model
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == ["body.0.lora_a", "body.0.lora_b"]
    assert type(model["lm_head"]) is nn.Linear


def test_add_lora_asks_the_model_for_its_head():
    class Model(nn.Sequential):
        def get_output_embeddings(self) -> nn.Module:
            return self[1]

    model = add_lora(Model(nn.Linear(4, 4), nn.Linear(4, 9)), rank=2)
    assert [type(m) for m in model] == [LoRALinear, nn.Linear]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q"], ["a.q", "b.q"]),
        (["a.q", "v"], ["a.q", "a.v", "b.v"]),
        (r"b\..*", ["b.q", "b.v"]),
        ("all-linear", ["a.q", "a.v", "b.q", "b.v"]),
    ],
)
def test_add_lora_targets(targets, expected):
    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)})

    model = add_lora(nn.ModuleDict({"a": block(), "b": block()}), rank=2, targets=targets)
    assert [n for n, m in model.named_modules() if isinstance(m, LoRALinear)] == expected
    assert [pair.name for pair in pyctrlora.attach(model).pairs] == expected


def test_add_lora_gives_a_shared_layer_one_adapter():
    shared = nn.Linear(4, 4)
    model = add_lora(nn.ModuleDict({"a": shared, "b": shared}), rank=2)
    assert model["a"] is model["b"]
    assert len(list(model.parameters())) == 4


def test_add_lora_twice_keeps_the_first_adapters():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    add_lora(model, rank=2, targets=["a"])
    add_lora(model, rank=3, targets=["b"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "a.lora_a", "a.lora_b", "b.lora_a", "b.lora_b",
    }  # fmt: skip
    with pytest.raises(ValueError, match="expected a model with linear layers besides its head"):
        add_lora(model)


def test_add_lora_leaves_multihead_attention_alone():
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 4)})
    add_lora(model, rank=2)
    assert not isinstance(model["mha"].out_proj, LoRALinear)
    assert isinstance(model["up"], LoRALinear)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: add_lora(nn.Linear(4, 4)),
            ValueError,
            r"wrap a single layer: LoRALinear\(layer\)",
        ),
        (
            lambda: add_lora(nn.Sequential(nn.Linear(4, 4)), targets=["q_proj"]),
            ValueError,
            r"got 'q_proj', which matches none of 0\. Remedy: give the end of a path",
        ),
        (
            lambda: LoRALinear(nn.Conv2d(1, 1, 1)),
            TypeError,
            "in_features and out_features; got Conv2d",
        ),
        (
            lambda: LoRALinear(nn.Linear(4, 4), rank=0),
            ValueError,
            r"rank = 0\. Violated constraint",
        ),
        (
            lambda: add_lora(nn.Sequential(nn.Linear(4, 4)), alpha=-1),
            ValueError,
            r"add_lora\] alpha = -1\. Violated constraint: alpha > 0",
        ),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    rank=st.integers(1, 4),
    alpha=st.floats(0.1, 100),
    tokens=st.integers(1, 5),
)
def test_any_shape_gives_the_same_as_merging(n, m, rank, alpha, tokens):
    layer = with_b(LoRALinear(nn.Linear(n, m).double(), rank=rank, alpha=alpha))
    x = torch.randn(tokens, n, dtype=torch.float64)
    merged = layer.weight + layer.scaling * layer.lora_b @ layer.lora_a
    expected = nn.functional.linear(x, merged, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10 * alpha)
