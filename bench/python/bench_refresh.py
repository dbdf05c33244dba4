"""Whether refreshes of the bases could be skipped: what they change, in a real run.

    python bench/python/bench_refresh.py [--steps 60] [--out FILE]

A small transformer's linears on a fixed set of batches. At each refresh of a factor, with U the
basis before and F' the factor after: "offdiag" is ‖offdiag(UᵀF'U)‖ / ‖UᵀF'U‖, which a skip would
neglect; "turned" is 1 − ‖UᵀU'‖²/k, the share of the new basis outside the old one. Quantiles over
layers, both factors and all refreshes after warm-up; "in_all" is the same from the first of them to
the last: a skipped refresh loses its turn for good, since the next sums start from the old basis.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import quantile, record
from torch import Tensor, nn

import pyctrlora


def factors(optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """Copies of all factors by group and side."""
    out: dict[str, dict[str, Tensor]] = {}
    for name, tensor in optimizer.state_dict()["ctrlora"]["tensors"].items():
        stem, _, last = name.rpartition(".")
        if last in ("basis", "eigenvalues", "trace") and stem.endswith(("input", "output")):
            out.setdefault(stem, {})[last] = tensor.double().clone()
    return out


def changes(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[tuple[float, float]]:
    """(offdiag, turned) of the layers whose basis changed."""
    found = []
    size, rank = before["basis"].shape[1:]
    for old, basis, values, trace in zip(
        before["basis"], after["basis"], after["eigenvalues"], after["trace"], strict=True
    ):
        if torch.equal(old, basis) or rank == size:
            continue
        overlap = old.T @ basis
        tail = (trace - values.sum()) / (size - rank)
        gram = overlap * (values - tail) @ overlap.T + tail * torch.eye(rank, dtype=old.dtype)
        off = gram - torch.diag(gram.diagonal())
        turned = 1 - overlap.square().sum() / rank
        found.append(((off.norm() / gram.norm()).item(), turned.item()))
    return found


def main() -> None:
    """Trains, compares factors step by step, and writes bench/results/refresh.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    model = nn.Sequential(
        nn.Embedding(512, 128), nn.TransformerEncoder(layer, 2), nn.Linear(128, 512)
    )
    tokens = torch.randint(0, 512, (64, 8, 65)) // torch.randint(1, 40, (64, 8, 65))  # skewed
    pyctrlora.add_lora(model, rank=8, targets=["linear1", "linear2"])
    optimizer = pyctrlora.CTROptimizer([p for p in model.parameters() if p.requires_grad])
    found: list[tuple[float, float]] = []
    first: dict[str, dict[str, Tensor]] = {}
    for step in range(options.steps):
        batch = tokens[step % len(tokens)]
        logits = model(batch[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        before = factors(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        after = factors(optimizer)
        if step >= 10:
            first = first or before
            for name, parts in before.items():
                found += changes(parts, after[name])
    result = {
        what: {f"p{share}": quantile([f[i] for f in found], share / 100) for share in (5, 50, 95)}
        for i, what in enumerate(("offdiag", "turned"))
    }
    whole = [pair for name in first for pair in changes(first[name], after[name])]
    result["in_all"] = {
        what: quantile([f[i] for f in whole], 0.5) for i, what in enumerate(("offdiag", "turned"))
    }
    record("refresh", {"refreshes": len(found), **result}, options.out)


if __name__ == "__main__":
    main()
