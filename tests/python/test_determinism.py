"""The same seed, the same bits: whatever thread refreshes the factors, and how many share a loop.

cpp/README.md, section 13, says what is promised and where torch itself is not deterministic.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

import pyctrlora
from pyctrlora import CTROptimizer


def train(threads: int, rank: int = 8, width: int = 640, **options: object) -> dict[str, str]:
    """Some steps on wide layers, of which each loop of ours has several pieces."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    pyctrlora.add_lora(model, rank=rank, targets=["0", "2"])
    model[0].lora_b.data.normal_(0, 0.1)
    opt = CTROptimizer(model.parameters(), lr=0.05, balance_every=4, factor_every=3, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(9):
        x = torch.randn(48, width, generator=generator)
        opt.zero_grad()
        torch.set_num_threads(1)  # the model's products are torch's
        (model(x) - x.flip(1)).square().mean().backward()
        torch.set_num_threads(threads)
        opt.step()
    tensors = {**dict(model.named_parameters()), **opt.state_dict()["ctrlora"]["tensors"]}
    return {
        name: hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, t in tensors.items()
        if not name.startswith("back.") and ".back." not in name
    }


@pytest.mark.parametrize("rank", [8, 3])  # with and without kernels of ours
def test_any_number_of_threads_gives_the_same_bits(rank):
    alone = train(1, rank)
    assert train(2, rank) == alone
    assert train(3, rank) == alone


def test_a_worker_thread_without_staleness_gives_the_bits_of_inline():
    assert train(1, overlap="thread", max_staleness=0) == train(1, overlap="inline")


@pytest.mark.parametrize("overlap", ["inline", "thread"])
def test_a_repeat_gives_the_same_bits(overlap):
    assert train(1, overlap=overlap) == train(1, overlap=overlap)


def test_another_seed_gives_others():
    first, second = train(1, sample_rows=16), train(1, sample_rows=16, seed=1)
    assert first["0.lora_a"] != second["0.lora_a"]
