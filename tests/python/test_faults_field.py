"""What users do to a model under a running optimizer: clear errors before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch

from pyctrlora import CTROptimizer, attach

GONE = r"expected the layers' own parameters; got old ones, .*{}' {}.*Remedy: attach\(model\)"


def backward(model, batches):
    (x, y), *_ = batches(1)
    (model(x) - y).square().mean().backward()


def test_two_optimizers_on_one_model(net, batches, train, trained, same):
    model = net("own")
    first = CTROptimizer(model.parameters())
    train(model, first, batches(2))
    second = CTROptimizer(model.parameters())
    before = trained(model)
    backward(model, batches)
    message = r"the only optimizer of its layers; got 'first', which a CTROptimizer built later"
    with pytest.raises(ValueError, match=message):
        first.step()
    same(trained(model), before)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # nothing is lost
    losses = train(model, second, batches(1) * 6)
    assert losses[-1] < losses[0]


def test_optimizers_of_disjoint_layers_work_side_by_side(net, batches, train):
    model = net("own")
    first = CTROptimizer(model.first.parameters())
    rest = CTROptimizer([*model.second.parameters(), *model.third.parameters()])
    data = batches(1) * 6
    losses = train(model, first, data, lambda: (rest.step(), rest.zero_grad()))
    assert losses[-1] < losses[0]


def test_a_replaced_optimizer_may_linger(net, batches, train):
    model = net("own")
    opt = CTROptimizer(model.parameters())
    for _ in range(3):
        opt = CTROptimizer(model.parameters(), lr=opt.param_groups[0]["lr"] / 2)
        train(model, opt, batches(2))
    assert opt.metrics()["steps"] == 2


@pytest.mark.parametrize("how", ["update_layer", "delete_adapter", "merge_and_unload"])
def test_peft_takes_the_parameters_away(net, batches, train, how):
    model = net("peft", init_lora_weights=True)
    opt = CTROptimizer.from_model(model)
    train(model, opt, batches(2))
    second = model.base_model.model.second
    if how == "update_layer":
        config = model.peft_config["default"]
        second.update_layer("default", r=2, lora_alpha=4.0, config=config)
        name, reason = "second", r"got new parameters \(update_layer"
    elif how == "delete_adapter":
        second.delete_adapter("default")
        name, reason = "second", "was deleted"
    else:
        model = model.merge_and_unload().requires_grad_(True)
        del second
        name, reason = "first", "was merged or unloaded"
    before = [p.detach().clone() for p in model.parameters()]
    model.zero_grad()
    backward(model, batches)
    with pytest.raises(ValueError, match=GONE.format(name, reason)):
        opt.step()
    after = list(model.parameters())
    assert all(torch.equal(p, old) for p, old in zip(after, before, strict=True))


def test_the_remedy_works_after_update_layer(net, batches, train):
    model = net("peft")
    train(model, CTROptimizer.from_model(model), batches(2))
    layer = model.base_model.model.second
    layer.update_layer("default", r=2, lora_alpha=4.0, config=model.peft_config["default"])
    attachment = attach(model)
    opt = CTROptimizer(model.parameters())
    losses = train(model, opt, batches(1) * 6)
    assert losses[-1] < losses[0]
    assert [pair.a.shape[0] for pair in attachment.pairs] == [3, 2, 3]


def test_new_parameters_of_an_own_layer(net, batches, train):
    model = net("own")
    opt = CTROptimizer(model.parameters())
    train(model, opt, batches(1))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    backward(model, batches)
    with pytest.raises(ValueError, match=GONE.format("first", r"got new parameters \(load_state")):
        opt.step()


def test_loading_an_adapter_of_the_same_ranks_goes_on(net, batches, train, tmp_path):
    model = net("peft")
    opt = CTROptimizer.from_model(model)
    model.save_pretrained(tmp_path)
    train(model, opt, batches(3))
    model.load_adapter(tmp_path, "default", is_trainable=True)  # as the Trainer's resume does
    losses = train(model, opt, batches(1) * 6)
    assert losses[-1] < losses[0]


def test_a_checkpoint_of_another_rank_layout_names_the_layers(net):
    saved = copy.deepcopy(CTROptimizer(net("own", rank=2).parameters()).state_dict())
    model = net("own", rank=3)
    opt = CTROptimizer(model.parameters())
    before = copy.deepcopy(opt.state_dict()["ctrlora"]["tensors"])
    with pytest.raises(ValueError, match=r"momentum_a: expected \[.*3.*\]; got \[.*2.*\]"):
        opt.load_state_dict(saved)
    after = opt.state_dict()["ctrlora"]["tensors"]
    same_bits = {"rtol": 0, "atol": 0, "equal_nan": True}
    assert all(torch.allclose(after[n], tensor, **same_bits) for n, tensor in before.items())
