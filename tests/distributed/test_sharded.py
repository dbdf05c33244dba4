"""Adapters under FSDP2: sharded ones are refused, replicated ones beside a sharded base train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pyctrlora


@pytest.fixture
def mesh(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())
    return pyctrlora.add_lora(net, rank=2)


def test_sharded_adapters_are_refused_by_name(mesh):
    net = model()
    fully_shard(net, mesh=mesh)
    with pytest.raises(TypeError, match=r"got '0.lora_[ab]'.* sharded as a DTensor. Remedy: leave"):
        pyctrlora.CTROptimizer(net.named_parameters())


def test_replicated_adapters_of_a_sharded_model_train_as_ever(mesh):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    losses = []
    for sharded in (False, True):
        net = model()
        if sharded:
            own = {p for name, p in net.named_parameters() if "lora_" in name}
            fully_shard(net, mesh=mesh, ignored_params=own)
        opt = pyctrlora.CTROptimizer.from_model(net)
        own_losses = []
        for _ in range(6):
            opt.zero_grad()
            loss = (net(x) - 1).square().mean()
            loss.backward()
            opt.step()
            own_losses.append(loss.item())
        losses.append(own_losses)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
