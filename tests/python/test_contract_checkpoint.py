"""torch.distributed.checkpoint in one process: its dummy step, the optimizer as a Stateful."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from pyctrlora import CTROptimizer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_the_dummy_step_changes_nothing(net, batches, train, trained, state, same, steps, tensor):
    """DCP steps by itself, with zero gradients at lr 0, to make torch's optimizers create state."""
    results: list[Any] = []
    for dummy in (False, True):
        model = net("own")
        lr = torch.tensor(0.1) if tensor else 0.1
        opt = CTROptimizer(model.named_parameters(), lr=lr)
        train(model, opt, batches(steps))
        opt.zero_grad()
        if dummy:
            saved = get_optimizer_state_dict(model, opt)
            assert "ctrlora" not in saved  # it keeps what it knows, by parameter
            assert all(float(g["lr"]) == pytest.approx(0.1) for g in opt.param_groups[:1])
        assert opt.metrics()["steps"] == steps
        train(model, opt, batches(3))
        results.append((trained(model), state(opt)))
    same(results[1][0], results[0][0])
    same(results[1][1], results[0][1])


def test_saved_whole_as_a_stateful(net, batches, train, trained, same, tmp_path):
    """`dcp.save({"optimizer": opt})` keeps every key, unlike get_optimizer_state_dict."""
    data = batches(6)
    model = net("own")
    opt = CTROptimizer(model.parameters())
    train(model, opt, data[:3])
    dcp.save({"model": model, "optimizer": opt}, checkpoint_id=tmp_path / "run")
    train(model, opt, data[3:])

    again = net("own", seed=5)
    resumed = CTROptimizer(again.parameters())
    train(again, resumed, batches(1))
    dcp.load({"model": again, "optimizer": resumed}, checkpoint_id=tmp_path / "run")
    assert resumed.metrics()["steps"] == 3
    train(again, resumed, data[3:])
    same(trained(again), trained(model))
