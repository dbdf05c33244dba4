"""CTROptimizer as a torch.optim.Optimizer."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from pyctrlora import _C, CTROptimizer, EngineOptions, add_lora, attach


def mixed(net: Any) -> nn.Module:
    """A Net of which the last layer is trained as it is."""
    model = net("none")
    add_lora(model, rank=3, targets=["first", "second"])
    for module in (model.first, model.second):
        nn.init.normal_(module.lora_b, std=0.3)
    model.third.requires_grad_(True)
    return model


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


# ---- construction and groups ----


def test_splits_a_group_in_two(net):
    opt = CTROptimizer(trainable(mixed(net)), lr=0.05, fallback_lr=2e-3, fallback_weight_decay=0.1)
    pairs, fallback = opt.param_groups
    assert pairs["param_names"] == [
        "first.lora_a",
        "first.lora_b",
        "second.lora_a",
        "second.lora_b",
    ]
    assert (pairs["kind"], pairs["lr"], pairs["weight_decay"]) == ("pairs", 0.05, 0.0)
    assert fallback["param_names"] == ["third.weight", "third.bias"]
    assert (fallback["kind"], fallback["lr"], fallback["weight_decay"]) == ("fallback", 2e-3, 0.1)
    assert (fallback["betas"], fallback["eps"]) == ((0.9, 0.999), 1e-8)
    assert not any(key.startswith("fallback_") for g in opt.param_groups for key in g)


@pytest.mark.parametrize(
    "params",
    [
        lambda m: m.parameters(),
        lambda m: list(m.named_parameters()),
        lambda m: [{"params": m.parameters()}],
        lambda m: [{"params": m.first.parameters()}, {"params": m.second.named_parameters()}],
    ],
)
def test_takes_params_as_torch_does(net, params, batches, train):
    model = mixed(net)
    if params(model).__class__ is list and len(params(model)) == 2:
        with pytest.raises(ValueError, match="with/without names"):
            CTROptimizer(params(model))
        return
    losses = train(model, CTROptimizer(params(model)), batches(1) * 5)
    assert losses[-1] < losses[0]


def test_fallback_is_adamw(net, batches, train, trained, same):
    results = []
    for build in (
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1),
        lambda p: CTROptimizer(
            p,
            fallback_lr=0.01,
            fallback_betas=(0.8, 0.9),
            fallback_eps=1e-6,
            fallback_weight_decay=0.1,
        ),
    ):
        model = mixed(net)
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith("third"))
        model.first.lora_a.requires_grad_(True)  # half a pair is none
        opt = quiet(build, [p for p in model.parameters() if p.requires_grad])
        train(model, opt, batches(6))
        results.append(trained(model))
    same(*results, rtol=1e-12)


def quiet(build: Any, params: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        return build(params)


def test_groups_keep_their_own_numbers(net):
    model = mixed(net)
    opt = CTROptimizer(
        [
            {"params": model.first.parameters(), "lr": 0.2, "weight_decay": 0.3, "tag": "x"},
            {"params": [*model.second.parameters(), *model.third.parameters()], "fallback_lr": 0.5},
        ],
        lr=0.1,
    )
    kinds = [(g["kind"], g["lr"], g["weight_decay"], g.get("tag")) for g in opt.param_groups]
    assert kinds == [
        ("pairs", 0.2, 0.3, "x"),
        ("fallback", 1e-3, 0.0, "x"),  # the frozen base of the first layer
        ("pairs", 0.1, 0.0, None),
        ("fallback", 0.5, 0.0, None),
    ]


def test_lr_of_a_group_without_pairs_is_not_dropped_silently(net):
    model = mixed(net)
    heads = {"params": model.third.parameters(), "lr": 1e-4}
    with pytest.warns(UserWarning, match=r"so its lr=0.0001 .* is not used.* fallback_lr=0.001"):
        CTROptimizer([{"params": model.first.parameters()}, heads])


def test_parameter_groups_may_come_later(net, batches, train):
    model = mixed(net)
    opt = CTROptimizer([model.first.lora_a, model.first.lora_b])
    train(model, opt, batches(2))
    opt.add_param_group({"params": model.second.parameters(), "lr": 0.05})
    opt.add_param_group({"params": model.third.parameters()})
    before = copy.deepcopy(model.state_dict())
    train(model, opt, batches(2))
    assert list(opt.ranks()) == ["first", "second"]
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == {name for name, _ in trainable(model)}


def test_frozen_parameters_join_once_they_thaw(net, batches, train):
    model = mixed(net)
    model.third.requires_grad_(False)
    opt = CTROptimizer(model.parameters())
    before = model.third.weight.clone()
    train(model, opt, batches(1))
    assert torch.equal(model.third.weight, before)
    model.third.requires_grad_(True)
    train(model, opt, batches(1))
    assert not torch.equal(model.third.weight, before)
    assert "4 frozen ones left alone" in opt.describe()  # the bases of the two adapted layers


def test_pairs_found_by_name_alone(net, batches, train):
    model = net("peft")
    with pytest.warns(UserWarning, match="3 pairs were found by their names only.* scaling .* 1"):
        opt = CTROptimizer(model.named_parameters())
    assert list(opt.ranks()) == [f"base_model.model.{n}" for n in ("first", "second", "third")]
    assert (
        "3, not observed" in opt.describe().replace("of", "3,") or "not observed" in opt.describe()
    )
    losses = train(model, opt, batches(1) * 12)
    assert losses[-1] < losses[0]


def test_without_pairs_everything_is_trained_by_adamw(net, batches, train):
    model = net("peft")
    with pytest.warns(UserWarning, match="found no LoRA pair among its parameters and trains all"):
        opt = CTROptimizer(model.parameters(), fallback_lr=0.01)
    losses = train(model, opt, batches(1) * 10)
    assert losses[-1] < losses[0]
    assert opt.ranks() == {}


def test_from_model_names_and_attaches(net, batches, train):
    model = net("peft")
    opt = CTROptimizer.from_model(model, lr=0.2, sketch_rank=4, loss_terms=20)
    assert all(_C.find_slot(p) is not None for p in opt.param_groups[0]["params"])
    assert opt.param_groups[0]["lr"] == 0.2
    assert "param_names" in opt.param_groups[0]
    train(model, opt, batches(3))


def test_pairs_of_two_models_keep_apart(net):
    first, second = net("own"), net("own")
    opt = CTROptimizer([*first.parameters(), *second.parameters()])
    assert list(opt.ranks()) == ["first", "second", "third", "first#2", "second#2", "third#2"]


# ---- options ----


def test_every_option_of_the_engine_is_a_keyword():
    fields = {name for name in dir(_C.Options) if not name.startswith("_")} - {"validate"}
    assert set(EngineOptions.__annotations__) | {"fallback_lr"} == fields
    documented = inspect.getdoc(EngineOptions) or ""  # Python 3.13 compiles it without the indent
    assert all(f"\n    {name}: " in documented for name in EngineOptions.__annotations__)


@pytest.mark.parametrize("terms", ["tokens", "sequences", 20, 4])
def test_loss_terms_scale_the_predicted_kl_only(net, batches, train, terms):
    model = net("own")
    opt = CTROptimizer(model.parameters(), loss_terms=terms, kl_radius=float("inf"))
    train(model, opt, batches(1))
    reference = net("own")
    base = CTROptimizer(reference.parameters(), loss_terms=1, kl_radius=float("inf"))
    train(reference, base, batches(1))
    expected = {"tokens": 20, "sequences": 4}.get(terms, terms)
    ratio = opt.metrics()["predicted_kl"] / base.metrics()["predicted_kl"]
    assert ratio == pytest.approx(expected, rel=1e-9)


# ---- the contract of torch.optim ----


def test_closure_runs_once_with_gradients(net, batches):
    model = net("own")
    opt = CTROptimizer(model.parameters())
    (x, y), *_ = batches(1)
    calls = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        assert opt.step(closure) is calls[0]
    assert len(calls) == 1
    assert opt.metrics()["steps"] == 1


def test_gradients_are_not_written(net, batches, train):
    model = net("own")
    opt = CTROptimizer(model.parameters())
    grads: dict[str, torch.Tensor] = {}
    train(
        model, opt, batches(1),
        lambda: grads.update({n: p.grad.clone() for n, p in trainable(model)}),
    )  # fmt: skip
    for name, p in trainable(model):
        assert torch.equal(p.grad, grads[name])


def test_hooks_fire(net, batches, train):
    model = net("own")
    opt = CTROptimizer(model.parameters())
    fired: list[str] = []

    def see_section(opt: Any, state: dict[str, Any]) -> None:
        assert state["ctrlora"]["version"] == 1
        fired.append("state_dict")

    opt.register_step_pre_hook(lambda *_: fired.append("before"))
    opt.register_step_post_hook(lambda *_: fired.append("after"))
    opt.register_state_dict_post_hook(see_section)
    opt.register_load_state_dict_pre_hook(lambda *_: fired.append("load"))
    opt.register_load_state_dict_post_hook(
        lambda o: fired.append(f"loaded {o.metrics()['steps']:g}")
    )
    train(model, opt, batches(1))
    state = copy.deepcopy(opt.state_dict())
    train(model, opt, batches(1))
    opt.load_state_dict(state)
    assert fired == ["before", "after", "state_dict", "before", "after", "load", "loaded 1"]


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, (t + 1) / 4)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=[0.1, 1e-3], total_steps=10, cycle_momentum=False
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers_drive_both_groups(net, batches, name, tensor):
    model = mixed(net)
    lr = torch.tensor(0.1) if tensor else 0.1
    opt = CTROptimizer(trainable(model), lr=lr, kl_radius=1e9)
    scheduler = SCHEDULERS[name](opt)
    (x, y), *_ = batches(1)
    for _ in range(8):
        loss = (model(x) - y).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        pairs, fallback = (float(g["lr"]) for g in opt.param_groups)
        assert pairs == pytest.approx(100 * fallback, rel=1e-5)
        assert opt.metrics()["output_change_max"] <= pairs * (1 + 1e-6)
        # The Fisher ball shrinks with the square of the lr, relative to its base or peak.
        assert opt.metrics()["kl_radius"] == pytest.approx(1e9 * (pairs / 0.1) ** 2, rel=1e-5)
        scheduler.step()


def test_learning_rate_set_by_hand_counts_from_the_constructors(net, batches, train):
    model = net("own")
    opt = CTROptimizer(model.parameters(), lr=0.1)
    opt.param_groups[0]["lr"] = 0.05
    train(model, opt, batches(1))
    assert opt.metrics()["kl_radius"] == pytest.approx(0.005 / 4)


def test_grad_scaler_has_no_effect(net, batches, trained, same):
    results = []
    for enabled in (False, True):
        model = net("own", dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2, enabled=enabled)
        scale: Any = scaler.get_scale if enabled else 1.0
        opt = CTROptimizer(model.parameters(), loss_scale=scale, kl_radius=1e-4)
        for x, y in batches(8, dtype=torch.float32):
            opt.zero_grad()
            scaler.scale((model(x) - y).square().sum(-1).mean()).backward()
            scaler.step(opt)
            scaler.update()
        assert scaler.get_scale() == (256.0 * 16 if enabled else 1.0)
        results.append(trained(model))
    same(*results)  # powers of two: bit for bit


# ---- reports ----


def test_reports(net, batches, train):
    model = mixed(net)
    opt = CTROptimizer(trainable(model))
    train(model, opt, batches(2))
    assert opt.ranks() == {"first": 3, "second": 3}
    metrics = opt.metrics()
    assert all(isinstance(value, float) for value in metrics.values())
    assert (metrics["steps"], metrics["skipped"], metrics["retired"]) == (2, 0, 0)
    text = opt.describe()
    assert "group 0: 2 LoRA pairs, lr 0.1" in text
    assert "1 of 8 x 6, rank 3, observed: first" in text
    assert "group 1: 2 parameters by AdamW, lr 0.001" in text
    assert "'third.weight' (5, 8)" in text
    assert "Parameter Group 1" in repr(opt)


def test_attach_after_construction_is_observed_by_the_next_optimizer(net, batches, train):
    model = net("peft")
    with pytest.warns(UserWarning, match="names only"):
        CTROptimizer(model.named_parameters())
    attachment = attach(model)
    opt = CTROptimizer(model.parameters())
    train(model, opt, batches(1))
    assert [_C.find_slot(pair.a).observations for pair in attachment.pairs] == [1, 1, 1]
