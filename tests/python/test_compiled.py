"""The fused layer as an operator: compiled models keep one graph and are observed as they run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pyctrlora import _C, CTROptimizer, attach, fuse
from pyctrlora.adapters import adapter_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"  # dynamo
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def build(net: Any) -> Any:
    """`build(kind)`: a model that is fused and observed."""

    def make(kind: str, **config: Any) -> Any:
        pytest.importorskip("peft")
        model = net(kind, **config)
        if kind == "peft":
            fuse(model)
            attach(model)
        return model

    return make


def slots(model: nn.Module) -> list[Any]:
    return [_C.find_slot(layer.a) for layer in adapter_layers(model)]


def counts(model: nn.Module) -> list[int]:
    return [slot.observations for slot in slots(model)]


def no_breaks(graphs: int = 1) -> None:
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs


# ---- whole models ----


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["own", "peft"])
def test_a_compiled_run_is_the_eager_one(
    build, batches, train, trained, state, same, kind, backend
):
    results = []
    for compiles in (False, True):
        model = build(kind)
        opt = CTROptimizer(model.parameters(), lr=0.05, sample_rows=16, factor_every=3)
        run = torch.compile(model, backend=backend, fullgraph=True) if compiles else model
        losses = train(run, opt, batches(8))
        results.append((losses, trained(model), state(opt), counts(model)))
    no_breaks()
    (losses, parameters, factors, seen), (ours, its_parameters, its_factors, its_seen) = results
    assert losses == ours
    assert seen == its_seen == [6] * 3  # five of the warm-up, and one of the next three
    same(parameters, its_parameters)
    same(factors, its_factors)
    assert max(abs(t).max() for name, t in factors.items() if "eigenvalues" in name) > 0


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_the_graph_holds_the_operator(build, batches, kind):
    found = []

    def backend(graph: Any, _inputs: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(build(kind), backend=backend, fullgraph=True)
    compiled(batches(1)[0][0])
    assert sum("ctrlora.lora_linear" in name for name in found) == 3
    assert not any("addmm" in name or name.endswith("linear>") for name in found)


def test_observed_from_the_moment_it_is_attached(net, batches):
    pytest.importorskip("peft")
    model = net("peft")
    fuse(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = batches(1)[0][0]
    compiled(x).sum().backward()
    attachment = attach(model)
    opt = CTROptimizer(model.parameters())
    compiled(x).sum().backward()
    assert counts(model) == [1] * 3
    opt.zero_grad()
    attachment.detach()
    compiled(x).sum().backward()
    assert counters["graph_break"] == {}


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_nothing_is_observed_without_a_backward(build, batches, kind):
    model = build(kind)
    opt = CTROptimizer(model.parameters())  # listens while it lives
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = batches(1)[0][0]
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)
    compiled(x)  # its graph is dropped
    assert counts(model) == [0] * 3
    compiled(x).sum().backward()
    assert counts(model) == [1] * 3
    opt.step()


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_checkpointed_layers_are_observed_once(build, batches, kind):
    model = build(kind)
    inner = model if kind == "own" else model.base_model.model
    inner.reentrant = False
    opt = CTROptimizer(model.parameters())  # listens while it lives
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(batches(1)[0][0]).sum().backward()
    assert counts(model) == [1] * 3
    opt.step()
    no_breaks()


def test_layers_compiled_one_by_one_share_code(build, batches):
    model = build("own")
    opt = CTROptimizer(model.parameters())  # listens while it lives
    for layer in (model.first, model.second, model.third):
        layer.compile(backend="aot_eager", fullgraph=True)
    model(batches(1)[0][0]).sum().backward()
    assert counts(model) == [1] * 3  # each by its own slot, whatever the compiler reuses
    opt.step()


def test_autocast_computes_in_its_dtype(build):
    x = torch.randn(4, 5, 6)
    for kind in ("own", "peft"):
        torch._dynamo.reset()
        model = build(kind, dtype=torch.float32)
        results = []
        for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            with torch.autocast("cpu", torch.bfloat16):
                y = run(x)
            y.float().square().sum().backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            results.append((y, grads))
        (y, grads), (ours, its_grads) = results
        assert y.dtype is ours.dtype is torch.bfloat16
        torch.testing.assert_close(ours, y)
        torch.testing.assert_close(its_grads, grads, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("change", ["disable", "merge", "thaw"])
def test_what_cannot_be_fused_falls_back_in_compiled_code(build, batches, change):
    model = build("peft")
    x = batches(1)[0][0]
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    layer = model.base_model.model.second
    if change == "disable":
        model.base_model.disable_adapter_layers()
    elif change == "merge":
        model.merge_adapter()
    else:
        layer.base_layer.weight.requires_grad_(True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    if change == "thaw":
        compiled(x).sum().backward()
        assert layer.base_layer.weight.grad is not None


# ---- the operator alone ----

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def arguments(
    transposed: bool = False, bias: bool = True, frozen: str = "", dtype: Any = torch.float64
) -> tuple[Any, ...]:
    x, weight = torch.randn(2, 3, 6, dtype=dtype), torch.randn(4, 6, dtype=dtype)
    a, b = torch.randn(2, 6, dtype=dtype), torch.randn(4, 2, dtype=dtype)
    for name, tensor in (("x", x), ("a", a), ("b", b)):
        tensor.requires_grad_(name not in frozen)
    weight = weight.t().contiguous() if transposed else weight
    return x, weight, torch.randn(4, dtype=dtype) if bias else None, a, b, 0.5, 0, transposed


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", ["", "x", "ab"])
def test_opcheck(transposed, bias, frozen):
    args = arguments(transposed, bias, frozen)
    torch.library.opcheck(torch.ops.ctrlora.lora_linear.default, args, test_utils=CHECKS)


def test_opcheck_of_the_backward():
    x, weight, _, a, b, scaling, _, transposed = (
        t.detach() if isinstance(t, Tensor) else t for t in arguments()
    )
    byte = torch.zeros(1, dtype=torch.uint8)
    for needed in ([True, True, True], [False, True, False]):
        args = (torch.randn(2, 3, 4).double(), x, weight, a, b, byte, scaling, transposed, needed)
        op = torch.ops.ctrlora.lora_linear_backward.default
        torch.library.opcheck(op, args, test_utils=CHECKS)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_any_order(transposed):
    x, weight, bias, a, b, scaling, slot, _ = arguments(transposed)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.ops.ctrlora.lora_linear(x, weight, bias, a, b, scaling, slot, transposed)[0]

    torch.autograd.gradcheck(function, (x, a, b))
    torch.autograd.gradgradcheck(function, (x, a, b))


def test_a_copy_of_the_capture_carries_nothing(build, batches):
    model = build("own")
    opt = CTROptimizer(model.parameters())  # listens while it lives
    layer = model.first
    x = batches(1)[0][0]
    base, a, b = layer.base, layer.lora_a, layer.lora_b
    handle = slots(model)[0].handle
    y, capture = torch.ops.ctrlora.lora_linear(x, base.weight, base.bias, a, b, 2.0, handle, False)
    assert capture.dtype is torch.uint8
    assert capture.tolist() == [0]
    saved = [t.detach() for t in (torch.ones_like(y), x, base.weight, a, b)]
    for byte, seen in ((capture.clone(), 0), (capture, 1), (capture, 1)):
        rest = (byte, 2.0, False, [False, True, True])
        torch.ops.ctrlora.lora_linear_backward(*saved, *rest)
        assert counts(model)[0] == seen
    opt.zero_grad()


def test_unknown_and_dead_handles_observe_nothing(net, batches):
    model = net("own")
    handle = slots(model)[0].handle
    twin = copy.deepcopy(model)
    assert slots(twin)[0].handle not in (0, handle)
    x, weight, bias, a, b, scaling, _, transposed = arguments()
    del model
    for number in (handle, 10**12, -1):
        y, _ = torch.ops.ctrlora.lora_linear(x, weight, bias, a, b, scaling, number, transposed)
        y.sum().backward()
