"""Bad input is refused with a message that says what to do; bad numbers are survived."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyctrlora import _C, CTROptimizer, LoRALinear

REFUSED = (ValueError, TypeError)


def weight(*shape: int, **kw: Any) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (3,)), **kw))


def layer(**kw: Any) -> LoRALinear:
    return LoRALinear(nn.Linear(6, 4), rank=2, **kw)


# ---- options ----


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("sketch_rank", 0, r"sketch_rank = 0\. Violated constraint: sketch_rank >= 1"),
        ("sample_rows", 0, r"sample_rows = 0\. Violated constraint: sample_rows >= 1"),
        ("factor_every", 0, r"factor_every = 0\."),
        ("factor_warmup_steps", -1, r"factor_warmup_steps = -1\."),
        ("factor_beta", 1.0, r"factor_beta = 1\."),
        ("damping", 0.0, r"damping = 0\. Violated constraint: damping > 0"),
        ("damping", math.nan, r"damping = nan\."),
        ("whitening", 1.5, r"whitening = 1\.5\."),
        ("dense_limit", 0, r"dense_limit = 0\."),
        ("loss_terms", -2, r"loss_terms = -2\."),
        (
            "loss_terms",
            "words",
            r"loss_terms = 'words'\. Violated constraint: 'tokens', 'sequences'",
        ),
        ("loss_reduction", "max", r"loss_reduction = max\."),
        ("loss_scale", 0.0, r"loss_scale = 0\."),
        ("beta1", 1.0, r"beta1 = 1\."),
        ("gram_floor", 0.0, r"gram_floor = 0\."),
        ("kl_radius", 0.0, r"kl_radius = 0\. Violated constraint: kl_radius > 0"),
        ("rms_beta", -0.1, r"rms_beta = -0\.1\."),
        ("step_length", "fixed", r"step_length = fixed\."),
        ("balance_every", 0, r"balance_every = 0\."),
        ("max_misses", 0, r"max_misses = 0\."),
        ("lr", -0.1, r"CTROptimizer\] lr = -0\.1\. Violated constraint: lr >= 0"),
        ("lr", math.inf, r"lr = inf\."),
        (
            "lr",
            torch.ones(2),
            r"lr = a tensor \(2,\)\. Violated constraint: a number, or a tensor of",
        ),
        ("fallback_lr", -1.0, r"fallback_lr = -1\.0\."),
        ("weight_decay", -1.0, r"weight_decay = -1\.0\."),
        ("fallback_eps", -1.0, r"fallback_eps = -1\.0\."),
        ("fallback_betas", (0.9, 1.0), r"fallback_betas = \(0\.9, 1\.0\)\. .* both in \[0, 1\)"),
        ("seed", -1, r"expected seed as in EngineOptions; got -1 of type int"),
        ("sketch_rank", "16", r"expected sketch_rank as in EngineOptions; got '16' of type str"),
        (
            "sketchrank",
            16,
            r"expected an option of EngineOptions; got 'sketchrank'\. Remedy: one of .*sketch_rank",
        ),
    ],
)
def test_options_out_of_range(name, value, rule):
    with pytest.raises(REFUSED, match=rule):
        CTROptimizer(layer().parameters(), **{name: value})


# ---- parameters ----


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (
            list,
            ValueError,
            r"at least one parameter; got an empty list\. Remedy: pass model\.pa",
        ),
        (lambda: [{"params": []}], ValueError, "at least one parameter; got an empty list"),
        (
            lambda: weight(),
            TypeError,
            r"an iterable of tensors or dicts; got one tensor\. Remedy: \[",
        ),
        (
            lambda: [1.0],
            TypeError,
            r"expected tensors, .* got float\. Remedy: pass model\.parameters",
        ),
        (lambda: [{"lr": 1}], TypeError, "expected a dict with 'params'; got dict"),
        (lambda: [{"params": {weight()}}], TypeError, "expected ordered params; got a set"),
        (
            lambda: [torch.zeros(3, dtype=torch.int64)],
            TypeError,
            r"real floating-point parameters; got a tensor \(3,\) of torch\.int64\. Remedy: le",
        ),
        (
            lambda: [("w", weight(2, dtype=torch.complex64))],
            TypeError,
            r"real floating-point parameters; got 'w' \(2,\) of torch\.complex64",
        ),
        (
            lambda: [torch.eye(3).to_sparse().requires_grad_()],
            TypeError,
            r"dense parameters; got a tensor \(3, 3\) with layout torch\.sparse_coo\. Reme",
        ),
        (
            lambda: [weight() * 2],
            ValueError,
            r"expected leaf tensors; got a tensor \(3,\), which is",
        ),
        (lambda: [("w", weight()), weight()], ValueError, "names for all parameters or for none"),
        (
            lambda: [(3, weight())],
            TypeError,
            r"expected \(name, tensor\) with a str; got 3 as name",
        ),
    ],
)
def test_params_that_cannot_be_trained(params, error, message):
    with pytest.raises(error, match=message):
        CTROptimizer(params())


def test_a_parameter_twice():
    w = weight(4)
    with pytest.raises(
        ValueError, match=r"each parameter once; got 'b' \(4,\) twice|'a' \(4,\) twice"
    ):
        CTROptimizer([("a", w), ("b", w)])
    with pytest.raises(
        ValueError, match=r"each parameter in one group; got a tensor \(4,\) in a sec"
    ):
        CTROptimizer([{"params": [w]}, {"params": [w]}])


def test_half_a_pair_names_both():
    one = layer(name="deep.down")
    message = (
        r"both halves of pair 'deep\.down' in one parameter group: lora_a \(2, 6\) and lora_b "
        r"\(4, 2\); got only \(4, 2\)\. Remedy: pass both"
    )
    with pytest.raises(ValueError, match=message):
        CTROptimizer([one.lora_b])
    with pytest.raises(ValueError, match=r"got only \(2, 6\)"):
        CTROptimizer([{"params": [one.lora_a]}, {"params": [one.lora_b]}])


def test_half_a_pair_by_name_names_both():
    params = [("net.q.lora_A.default.weight", weight(2, 6))]
    message = (
        r"pair 'net\.q' in one parameter group: lora_a net\.q\.lora_A\.default\.weight and lora_b "
        r"net\.q\.lora_B\.default\.weight; got only net\.q\.lora_A\.default\.weight"
    )
    with pytest.raises(ValueError, match=message):
        CTROptimizer(params)


def test_a_pair_on_two_devices():
    params = [
        ("q.lora_A.default.weight", weight(2, 6)),
        ("q.lora_B.default.weight", weight(4, 2, device="meta")),
    ]
    message = (
        r"both halves of pair 'q' on one device; got lora_a \(2, 6\) on cpu and lora_b \(4, 2\) on "
        r"meta\. Remedy: move the layer as a whole"
    )
    with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="names only"):
        CTROptimizer(params)


def test_shapes_that_do_not_fit_name_both():
    with pytest.raises(
        ValueError, match=r"pair 'x'.*a \(r, n\) and b \(m, r\).*\[2, 6\].*\[4, 3\]"
    ):
        _C.register_pair(_C.LoraPair(weight(2, 6), weight(4, 3), 1.0, "x"))
    with pytest.raises(
        ValueError, match=r"one dtype; got a \[2, 6\] Float on cpu and b \[4, 2\] Double"
    ):
        _C.register_pair(_C.LoraPair(weight(2, 6), weight(4, 2, dtype=torch.float64), 1.0, "x"))
    one = layer(name="first")
    with pytest.raises(
        ValueError, match=r"pair 'x': one of its tensors is already paired .* 'first'"
    ):
        _C.register_pair(_C.LoraPair(one.lora_a, weight(4, 2), 1.0, "x"))


# ---- numbers ----


def poison(parameter: Tensor, value: float) -> None:
    assert parameter.grad is not None
    parameter.grad.view(-1)[0] = value


def slab_of(pair: Any, tensors: dict[str, Tensor]) -> str:
    """The prefix of the only group of this pair's shape."""
    groups = {name.partition(".")[0] for name in tensors if name.startswith("group")}
    shapes = (pair.a.shape, pair.b.shape)
    (found,) = [
        group
        for group in groups
        if tuple(tensors[f"{group}.momentum_{half}"].shape[1:] for half in "ab") == shapes
    ]
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["own", "peft"])
@pytest.mark.parametrize("half", ["a", "b"])
def test_a_bad_gradient_leaves_its_layer_alone(net, batches, train, state, kind, value, half):
    model = net(kind)
    opt = CTROptimizer.from_model(model)
    data = batches(1) * 6
    losses = train(model, opt, data[:2])
    pair = next(p for _, p in opt._roster.all_pairs() if p.name.endswith("second"))
    before, kept = state(opt), (pair.a.clone(), pair.b.clone())
    others = [p.b.clone() for _, p in opt._roster.all_pairs() if p.name != pair.name]
    train(model, opt, data[:1], lambda: poison(getattr(pair, half), value))
    after = state(opt)
    slab = slab_of(pair, after)
    assert torch.equal(pair.a, kept[0])
    assert torch.equal(pair.b, kept[1])
    for name in ("momentum_a", "momentum_b", "momentum_weight", "rms_square"):
        assert torch.equal(after[f"{slab}.{name}"], before[f"{slab}.{name}"])
    assert all(t.isfinite().all() for t in after.values() if t.is_floating_point())
    assert opt.metrics()["skipped"] == 1
    moved = [p.b for _, p in opt._roster.all_pairs() if p.name != pair.name]
    assert not any(torch.equal(x, y) for x, y in zip(others, moved, strict=True))
    losses += train(model, opt, data[3:])
    assert losses[-1] < losses[0]
    assert opt.metrics()["skipped"] == 1


def test_a_bad_loss_leaves_everything_alone(net, batches, train, trained, same):
    model = net("own")
    opt = CTROptimizer(model.parameters())
    data = batches(1)
    train(model, opt, data)
    before = trained(model)
    train(model, opt, [(data[0][0], data[0][1] * math.inf)])
    same(trained(model), before)
    assert opt.metrics()["skipped"] == 3
    losses = train(model, opt, data * 4)
    assert losses[-1] < losses[0]


def test_a_bad_gradient_of_a_fallback_parameter_is_skipped(net, batches, train, trained):
    model = net("own")
    model.third.base.requires_grad_(True)
    opt = CTROptimizer(model.parameters())
    data = batches(1)
    before = model.third.base.bias.clone()
    train(model, opt, data, lambda: poison(model.third.base.bias, math.nan))
    assert torch.equal(model.third.base.bias, before)
    assert opt.metrics()["skipped"] == 1


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    with pytest.warns(UserWarning, match="found no LoRA pair"):
        opt = CTROptimizer(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"expected dense gradients; got .*Sparse.*Remedy: "):
        opt.step()


def test_gradients_of_none(net, batches, train, trained, state, same):
    model = net("own")
    opt = CTROptimizer(model.parameters())
    before, tensors = trained(model), state(opt)
    opt.step()
    same(trained(model), before)
    (x, _), *_ = batches(1)
    (model.first(x).square().mean()).backward()  # the other layers take no part
    opt.step()
    for name, p in trained(model).items():
        assert torch.equal(p, before[name]) != name.startswith("first")
    assert opt.metrics()["skipped"] == 0
    assert set(tensors) == set(state(opt))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["own", "peft"])
def test_b_of_zero_at_the_first_step(net, batches, train, kind, dtype):
    model = net(kind, start=0.0, dtype=dtype)
    opt = CTROptimizer.from_model(model)
    pairs = [pair for _, pair in opt._roster.all_pairs()]
    starts = [pair.a.clone() for pair in pairs]
    data = batches(1, dtype=dtype)
    losses = train(model, opt, data)
    assert all((pair.b != 0).any() for pair in pairs)
    # Only B has a gradient; balancing afterwards changes the gauge of A, not its row space.
    for pair, start in zip(pairs, starts, strict=True):
        both = torch.cat([pair.a, start]).double()
        assert torch.linalg.matrix_rank(both, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5) == 3
    losses += train(model, opt, data * 6)
    assert losses[-1] < losses[0]
    assert opt.metrics()["misses"] == 0


# ---- storage ----


def clone(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def cast(model: nn.Module) -> None:
    model.float().double()


def load(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()))


@pytest.mark.parametrize("replace", [clone, load])
@pytest.mark.parametrize("kind", ["own", "peft"])
def test_storage_replaced_after_construction(net, batches, train, trained, same, kind, replace):
    results = []
    for change in (lambda m: None, replace):
        model = net(kind)
        opt = CTROptimizer.from_model(model)
        change(model)
        train(model, opt, batches(3))
        change(model)
        train(model, opt, batches(3))
        results.append(trained(model))
    same(*results)


def test_one_parameter_replaced(net, batches, train):
    model = net("own")
    opt = CTROptimizer.from_model(model)
    data = batches(1)
    train(model, opt, data)
    model.second.lora_b.data = torch.zeros_like(model.second.lora_b)
    train(model, opt, data)
    assert (model.second.lora_b != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_cast_after_construction(net, batches, train, dtype):
    model = net("own")
    opt = CTROptimizer.from_model(model)
    losses = train(model, opt, batches(1) * 2)
    model.to(dtype)
    losses += train(model, opt, batches(1, dtype=dtype) * 6)
    assert model.first.lora_a.dtype is dtype
    assert losses[-1] < losses[0]
    cast(model)
    train(model, opt, batches(1))


def test_a_parameter_of_another_shape_is_refused(net, batches, train):
    model = net("own")
    opt = CTROptimizer.from_model(model)
    model.second.lora_a.data = torch.zeros(5, 8, dtype=torch.float64)
    model.second.lora_b.data = torch.zeros(8, 5, dtype=torch.float64)
    message = (
        r"of pair 'second' was replaced: expected \[3, 8\].*got \[5, 8\].*Remedy: build a new opt"
    )
    with pytest.raises(ValueError, match=message):
        train(model, opt, batches(1))
