"""What must not change a step, through the public API: exact in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pyctrlora
from pyctrlora import CTROptimizer, LoRALinear

TIGHT = 1e-9


@pytest.fixture
def run(net, batches, train, products):
    """`run(...)`: changes s B A of all layers after `steps` steps."""

    def go(kind: str = "own", steps: int = 6, alpha: float = 6.0, **options: Any) -> Any:
        model = net(kind, alpha=alpha)
        opt = CTROptimizer.from_model(model, **options)
        train(model, opt, batches(steps))
        return {name.rpartition(".")[2]: change for name, change in products(opt).items()}

    return go


def regauge(model: nn.Module, maps: dict[str, Tensor]) -> None:
    """A <- R A, B <- B R^-1: the same function."""
    for name, r in maps.items():
        layer = model.get_submodule(name)
        with torch.no_grad():
            layer.lora_a.copy_(r @ layer.lora_a)
            layer.lora_b.copy_(layer.lora_b @ torch.linalg.inv(r))


@pytest.mark.parametrize(
    "options", [{}, {"whitening": 1.0}, {"whitening": 0.0}, {"sketch_rank": 2}]
)
@pytest.mark.parametrize("alpha", [0.5, 48.0])
def test_alpha_does_not_matter(net, batches, train, products, same, alpha, options):
    results = []
    for a in (6.0, alpha):
        model = net("own", alpha=a)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_b.data *= 6.0 / a  # the same function at the start
        opt = CTROptimizer(model.parameters(), **options)
        train(model, opt, batches(6))
        results.append(products(opt))
    same(*results, rtol=TIGHT)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    spread=st.floats(0.0, 1.5),
    whitening=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_gauge_does_not_matter(seed, spread, whitening):
    generator = torch.Generator().manual_seed(seed)

    def orthogonal() -> Tensor:
        return torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]

    stretch = torch.exp(spread * torch.linspace(-1, 1, 3, dtype=torch.float64))
    r = orthogonal() * stretch @ orthogonal()
    x, y = (torch.randn(20, d, generator=generator, dtype=torch.float64) for d in (6, 5))
    changes = []
    for gauge in (torch.eye(3, dtype=torch.float64), r):
        torch.manual_seed(seed)
        layer = LoRALinear(nn.Linear(6, 5).double(), rank=3)
        nn.init.normal_(layer.lora_b, std=0.3)
        model = nn.ModuleDict({"only": layer})
        regauge(model, {"only": gauge})
        opt = CTROptimizer(model.parameters(), whitening=whitening)
        for _ in range(4):
            opt.zero_grad()
            (layer(x) - y).square().mean().backward()
            opt.step()
        changes.append((layer.lora_b @ layer.lora_a).detach())
    scale = changes[0].abs().max().item()
    torch.testing.assert_close(changes[0], changes[1], rtol=0, atol=1e-8 * scale)


@pytest.mark.parametrize("kind", ["own", "peft"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_big_batch(net, batches, products, same, kind, parts):
    results = []
    for pieces in (1, parts):
        model = net(kind)
        opt = CTROptimizer.from_model(model, sample_rows=1000)
        for x, y in batches(6):
            opt.zero_grad()
            for xs, ys in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                ((model(xs) - ys).square().sum(-1).mean() / pieces).backward()
            opt.step()
        results.append(products(opt))
    same(*results, rtol=TIGHT)


@pytest.mark.parametrize("options", [{}, {"step_length": "radius"}, {"whitening": 1.0}])
def test_sum_of_the_loss_equals_its_mean(net, batches, products, same, options):
    results = []
    for reduction in ("mean", "sum"):
        model = net("own")
        opt = CTROptimizer(model.parameters(), loss_reduction=reduction, kl_radius=1e-4, **options)
        for x, y in batches(6):
            opt.zero_grad()
            per_token = (model(x) - y).square().sum(-1)
            (per_token.mean() if reduction == "mean" else per_token.sum()).backward()
            opt.step()
        assert opt.metrics()["kl_shrink"] < 1  # the Fisher ball depends on the scale of S
        results.append(products(opt))
    same(*results, rtol=TIGHT)


@pytest.mark.parametrize("as_callable", [False, True])
@pytest.mark.parametrize("kind", ["own", "peft"])
def test_loss_scale_has_no_effect(net, batches, products, same, as_callable, kind):
    results = []
    for scales in (
        [1.0] * 6,
        [1024.0] * 6 if not as_callable else [2.0**k for k in (10, 10, 9, 9, 12, 1)],
    ):
        current = {"scale": scales[0]}
        model = net(kind)
        scale: Any = (lambda c=current: c["scale"]) if as_callable else scales[0]
        opt = CTROptimizer.from_model(model, loss_scale=scale, kl_radius=1e-4)
        for (x, y), current["scale"] in zip(batches(6), scales, strict=True):
            opt.zero_grad()
            loss = (model(x) - y).square().sum(-1).mean()
            (loss * current["scale"]).backward()
            for group in opt.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad /= current["scale"]  # GradScaler.unscale_
            opt.step()
        results.append(products(opt))
    same(*results)  # powers of two: bit for bit


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["own", "peft"])
def test_checkpointing_has_no_effect(net, batches, train, products, same, kind, reentrant):
    results = []
    for mode in (None, reentrant):
        model = net(kind)
        inner = model if kind == "own" else model.base_model.model
        inner.reentrant = mode
        opt = CTROptimizer.from_model(model, sample_rows=7)
        train(model, opt, batches(8))
        results.append(products(opt))
    same(*results)


def test_the_way_to_adapt_has_no_effect(run, same):
    same(run("own"), run("peft"), rtol=TIGHT)


def test_batched_equals_layer_by_layer(net, batches, train, products, same):
    """Layers of one shape in one slab, or each in its own group."""
    results = []
    for apart in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)), nn.Linear(6, 5)).double()
        pyctrlora.add_lora(model, rank=3, targets=["0", "1", "2", "3"])
        for module in list(model)[:4]:
            nn.init.normal_(module.lora_b, std=0.3)
        layers = list(model)[:4]
        together = [half for m in layers for half in (m.lora_a, m.lora_b)]
        params = [{"params": [m.lora_a, m.lora_b]} for m in layers] if apart else together
        opt = CTROptimizer(params, factor_every=1)
        train(model, opt, batches(5))
        results.append(products(opt))
    same(*results, rtol=TIGHT)


def test_step_of_lr_zero_is_inert(net, batches, train, trained, state, same):
    model = net("own")
    model.third.base.requires_grad_(True)
    opt = CTROptimizer.from_model(model, weight_decay=0.1)
    data = batches(5)
    train(model, opt, data[:2])
    lrs = [group["lr"] for group in opt.param_groups]
    before, tensors, numbers = trained(model), state(opt), opt.metrics()
    for group in opt.param_groups:
        group["lr"] = 0.0
    train(model, opt, data[2:3])
    opt.zero_grad(set_to_none=False)
    opt.step()
    same(trained(model), before)
    same(state(opt), tensors)
    assert opt.metrics() == numbers

    # ... and leaves no trace in what follows.
    twin, again = copy.deepcopy((model, opt))
    for m, o in ((model, opt), (twin, again)):
        for group, lr in zip(o.param_groups, lrs, strict=True):
            group["lr"] = lr
        train(m, o, data[3:])
    same(trained(model), trained(twin))


def test_first_step_at_lr_zero_starts_nothing(run, net, batches, train, products, same):
    """Distributed checkpointing creates state by a step with zero gradients and lr 0."""
    model = net("own")
    opt = CTROptimizer.from_model(model)
    lrs = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    opt.step()
    for group, lr in zip(opt.param_groups, lrs, strict=True):
        group["lr"] = lr
    train(model, opt, batches(6))
    same({n: t.clone() for n, t in products(opt).items()}, run())


def test_zero_gradients_move_nothing(net, batches, train, products, same):
    model = net("own")
    opt = CTROptimizer.from_model(model, beta1=0.0)
    train(model, opt, batches(2))
    before = products(opt)
    train(
        model,
        opt,
        batches(1),
        lambda: [p.grad.zero_() for p in model.parameters() if p.grad is not None],
    )
    same(products(opt), before, rtol=1e-12)
    assert opt.metrics()["misses"] == 0


def test_maximize_mirrors_the_loss(net, batches, products, same):
    results = []
    for maximize in (False, True):
        model = net("own")
        opt = CTROptimizer.from_model(model, maximize=maximize)
        for x, y in batches(4):
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            (-loss if maximize else loss).backward()
            opt.step()
        results.append(products(opt))
    same(*results, rtol=TIGHT)


def test_runs_repeat_bit_for_bit(run, same):
    same(run(sample_rows=5, sketch_rank=2), run(sample_rows=5, sketch_rank=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "rank"), [(3, 2, 3), (8, 4, 8), (3, 1, 2), (1, 1, 1)])
def test_rank_as_large_as_the_layer(n, m, rank, dtype):
    """Singular Grams: the step stays in the ball and still trains."""
    layer = LoRALinear(nn.Linear(n, m).to(dtype), rank=rank)
    opt = CTROptimizer(layer.parameters(), kl_radius=1e9)
    x, y = (torch.randn(50, d, dtype=dtype) for d in (n, m))
    losses = []
    for _ in range(20):
        before = layer(x).detach()
        opt.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
        change = (layer(x).detach() - before).norm() / layer.base(x).norm()
        assert change <= 0.1 * (1 + 1e-3)
    assert losses[-1] < losses[0]


def test_rank_above_the_number_of_inputs_is_trained_by_adamw():
    layer = LoRALinear(nn.Linear(3, 4), rank=5)
    with pytest.warns(UserWarning, match="'pair0' has rank 5 but only 3 inputs; AdamW trains it"):
        opt = CTROptimizer(layer.parameters())
    before = layer.lora_b.detach().clone()
    layer(torch.ones(2, 3)).sum().backward()
    opt.step()
    assert not torch.equal(layer.lora_b, before)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(lr=st.floats(1e-3, 3.0), rank=st.integers(1, 5), length=st.sampled_from(["rms", "radius"]))
def test_no_step_leaves_the_output_ball(lr, rank, length):
    torch.manual_seed(rank)
    layer = LoRALinear(nn.Linear(6, 5).double(), rank=rank)
    opt = CTROptimizer(layer.parameters(), lr=lr, step_length=length, kl_radius=1e9)
    x, y = (torch.randn(40, d, dtype=torch.float64) for d in (6, 5))
    for _ in range(5):
        before = layer(x).detach()
        opt.zero_grad()
        (layer(x) - y).square().mean().backward()
        opt.step()
        change = (layer(x).detach() - before).square().sum().sqrt()
        # All rows are seen, the batch is the same each step: the factor is exact.
        limit = lr * layer.base(x).square().sum().sqrt()
        assert change <= limit * (1 + 1e-7)
