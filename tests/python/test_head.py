"""Heads that are trained along: which layers are, and what their ball does to a step."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import pyctrlora
from pyctrlora import _C, CTROptimizer
from pyctrlora.heads import find_heads

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [  # PEFT asks transformers 5.18 so, dynamo for tensors' .grad
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
}


def classifier(kind: str = "Bert", **lora: object) -> nn.Module:
    """A small encoder for three classes under PEFT, its head drawn anew."""
    config = getattr(transformers, f"{kind}Config")(**SIZES, num_labels=3, pad_token_id=0)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    settings = {"r": 2, "target_modules": "all-linear", "task_type": "SEQ_CLS", **lora}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def batch(seed: int, rows: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 40, (rows, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids[:, 0] % 3}


def train(model: nn.Module, opt: CTROptimizer, seeds: range) -> None:
    for seed in seeds:
        model(**batch(seed)).loss.backward()
        opt.step()
        opt.zero_grad()


def names(model: nn.Module) -> list[str]:
    by_id = {id(module): name for name, module in model.named_modules()}
    return [by_id[id(head)].split("base_model.model.")[-1] for head in find_heads(model)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Bert", ["classifier.modules_to_save.default"]),
        ("Roberta", ["classifier.modules_to_save.default.out_proj"]),
        ("DistilBert", ["classifier.modules_to_save.default"]),
    ],
)
def test_the_last_trained_layer_behind_the_adapters_is_the_head(kind, expected):
    extra = {"modules_to_save": ["pre_classifier", "classifier"]} if kind == "DistilBert" else {}
    assert names(classifier(kind, **extra)) == expected


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 8)
        self.body = nn.Linear(8, 8)
        self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 1)


def test_heads_side_by_side_count_and_layers_before_an_adapter_do_not():
    model = pyctrlora.add_lora(TwoHeads(), rank=2, targets=["body"])
    assert names(model) == []  # all else is frozen
    model.requires_grad_(True)
    assert names(model) == ["left", "right"]


def test_a_language_model_has_none_and_pays_nothing(net):
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2})
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    assert names(model) == []
    opt = CTROptimizer.from_model(model)
    ids = torch.arange(20).view(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    opt.step()
    assert "head_change" not in opt.metrics()


def test_a_step_is_shortened_to_the_radius_and_says_so():
    model = classifier()
    opt = CTROptimizer.from_model(model, lr=1.0, head_radius=0.1)
    assert opt.describe().count("a head: steps by its outputs, bounds the pairs'") == 1
    train(model, opt, range(4))
    metrics = opt.metrics()
    assert metrics["head_change"] > metrics["head_radius"] == 0.1
    plain = CTROptimizer.from_model(classifier(), head_step=0.0)
    assert "head_gain" not in plain.metrics()
    for group in opt.param_groups:
        group["lr"] *= 0.5
    train(model, opt, range(4, 5))
    assert opt.metrics()["head_radius"] == pytest.approx(0.05)
    free = CTROptimizer.from_model(classifier(), lr=1.0, head_radius=math.inf)
    assert "head_change" not in free.metrics()


@pytest.mark.parametrize("width", [8, 1024])
def test_a_heads_step_moves_its_outputs_as_far_at_any_width(width):
    torch.manual_seed(9)
    model = pyctrlora.add_lora(nn.Sequential(nn.Linear(width, width), nn.Tanh()), rank=2)
    model.append(nn.Linear(width, 3))
    nn.init.zeros_(model[2].weight)  # as some models start
    opt = CTROptimizer.from_model(model, fallback_lr=2e-3)
    x = torch.randn(16, width)
    hidden, before = model[:2](x).detach(), model[2].weight.detach().clone()
    nn.functional.cross_entropy(model(x), torch.arange(16) % 3).backward()
    opt.step()
    change = hidden @ (model[2].weight.detach() - before).T
    assert change.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-4)
    assert opt.metrics()["head_gain"] > 0


def test_each_of_two_heads_has_its_own_length():
    torch.manual_seed(12)
    model = pyctrlora.add_lora(TwoHeads(), rank=2, targets=["body"])
    heads = [model.left, model.right]
    for head in heads:
        head.requires_grad_(True)
    opt = CTROptimizer.from_model(model)
    hidden = torch.randn(16, 8)
    inputs = [hidden, 100 * hidden]
    before = [head.weight.detach().clone() for head in heads]
    sum(head(x).square().mean() for head, x in zip(heads, inputs, strict=True)).backward()
    opt.step()
    for head, x, old in zip(heads, inputs, before, strict=True):
        change = x @ (head.weight.detach() - old).T
        assert change.square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-4)


def test_a_head_that_knows_its_task_by_heart_stays_finite():
    """Gradients vanish; a length in units of the loss would grow without bound."""
    torch.manual_seed(10)
    model = classifier()
    opt = CTROptimizer.from_model(model)
    gains = []
    for _ in range(300):
        train(model, opt, range(1))  # one batch over and over
        gains.append(opt.metrics()["head_gain"])
    (head,) = find_heads(model)
    with torch.no_grad():
        assert model(**batch(0)).loss < 0.1
    assert head.weight.abs().max() < 10
    assert max(gains[100:]) < 2 * min(gains[100:])


def test_a_fresh_head_learns_at_a_learning_rate_that_ruins_it_otherwise():
    losses = {}
    for radius in (0.3, math.inf):
        torch.manual_seed(1)
        model = classifier()
        opt = CTROptimizer.from_model(
            model, lr=10.0, fallback_lr=3e-3, head_radius=radius, head_step=0.0
        )
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=150)
        for seed in range(150):
            model(**batch(seed, 16)).loss.backward()
            opt.step(), schedule.step(), opt.zero_grad()
        with torch.no_grad():
            losses[radius] = model(**batch(999, 300)).loss.item()
    assert losses[0.3] < 0.5 * losses[math.inf]


def test_accumulation_equals_the_big_batch_and_evaluation_is_not_observed():
    ends = []
    for parts in (1, 3):
        torch.manual_seed(2)
        model = classifier().double()
        opt = CTROptimizer.from_model(model, lr=1.0, head_radius=0.05, sketch_rank=64)
        for seed in range(5):
            whole = batch(seed)
            for ids, labels in zip(*(whole[k].chunk(parts) for k in whole), strict=True):
                (model(input_ids=ids, labels=labels).loss / parts).backward()
            with torch.no_grad():
                model(**batch(100 + seed))
            opt.step(), opt.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-10)


def test_gradients_that_are_thrown_away_take_their_heads_outputs_along():
    ends = []
    for extra in (False, True):
        torch.manual_seed(3)
        model = classifier().double()
        opt = CTROptimizer.from_model(model, lr=1.0, head_radius=0.05, sketch_rank=64)
        for seed in range(4):
            if extra:
                (1e3 * model(**batch(50 + seed)).loss).backward()
                opt.zero_grad()
            train(model, opt, range(seed, seed + 1))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-10)


def test_clipped_gradients_take_the_same_steps():
    ends = []
    for kept in (1.0, 1e-3):
        torch.manual_seed(7)
        model = classifier().double()
        opt = CTROptimizer.from_model(model, lr=1.0, head_radius=0.05, fallback_eps=0.0)
        for seed in range(5):
            model(**batch(seed)).loss.backward()
            for p in model.parameters():
                if p.grad is not None:
                    p.grad *= kept
            opt.step(), opt.zero_grad()
        assert opt.metrics()["head_change"] > 0.05
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)


def test_a_resumed_run_goes_on_bit_for_bit():
    torch.manual_seed(4)
    model = classifier()
    start = copy.deepcopy(model.state_dict())
    opt = CTROptimizer.from_model(model, lr=1.0, head_radius=0.05)
    train(model, opt, range(4))
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, range(4, 8))
    again = classifier()
    again.load_state_dict(start)
    other = CTROptimizer.from_model(again, lr=1.0, head_radius=0.05)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(again, other, range(4, 8))
    for x, y in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(x, y)


def test_copies_are_blind_until_attached_and_detaching_ends_it():
    model = classifier()
    attachment = pyctrlora.attach(model)
    assert pyctrlora.attach(model)._heads == []  # twice does no harm
    (head,) = find_heads(model)
    slot = _C.find_head(head.weight)
    opt = CTROptimizer(model.parameters(), lr=1.0)
    assert slot.wanted
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(**batch(0)).loss.backward()
        assert _C.find_head(find_heads(twin)[0].weight) is None
        own = CTROptimizer.from_model(twin, lr=1.0)
        train(twin, own, range(2))
        assert own.metrics()["head_change"] > 0
    train(model, opt, range(2))
    assert opt.metrics()["head_change"] > 0
    attachment.detach()
    assert _C.find_head(head.weight) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no layer is observed any more
        left = CTROptimizer(model.named_parameters(), lr=1.0)
    train(model, left, range(2))
    assert "head_change" not in left.metrics()


def averages(opt: CTROptimizer) -> torch.Tensor:
    tensors = opt.state_dict()["ctrlora"]["tensors"]
    return torch.cat([tensor for name, tensor in tensors.items() if name.startswith("head.")])


def test_a_rejected_step_takes_the_heads_averages_back():
    torch.manual_seed(5)
    model = classifier()
    opt = CTROptimizer.from_model(
        model, lr=50.0, head_radius=1e9, kl_radius=math.inf, ratio_every=1
    )
    rejected = False
    for seed in range(12):
        data = batch(seed)

        def loss(data: dict[str, torch.Tensor] = data) -> torch.Tensor:
            return model(**data).loss

        loss().backward()
        before = averages(opt)
        count = opt.metrics()["rejected"]
        opt.step(loss=loss)
        if opt.metrics()["rejected"] > count:
            rejected = True
            assert torch.equal(averages(opt), before)
        opt.zero_grad()
    assert rejected


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_keeps_one_graph_and_takes_the_same_steps(backend):
    ends = []
    for compiles in (False, True):
        torch.manual_seed(6)
        model = pyctrlora.add_lora(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), rank=2)
        model.append(nn.Linear(8, 3))
        nn.init.normal_(model[0].lora_b, std=0.3)
        opt = CTROptimizer.from_model(model, lr=1.0, head_radius=0.02)
        run = torch.compile(model, backend=backend, fullgraph=True) if compiles else model
        for seed in range(3):
            x = torch.randn(12, 6, generator=torch.Generator().manual_seed(seed))
            nn.functional.cross_entropy(run(x), torch.arange(12) % 3).backward()
            opt.step(), opt.zero_grad()
        assert opt.metrics()["head_change"] > 0.02
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)
