"""A long run of a tiny model: what grows, drifts or differs only after thousands of steps.

    python bench/python/soak.py [--steps 20000] [--overlap inline|thread] [--out FILE]

Two adapted layers and a head under a rank budget: rank events up to 70 % of the steps, batches of
NaN and loss spikes, balancing, and every `--reload` steps a checkpoint from which a new model and
a new optimizer go on. The whole run twice, from the same seed. It ends with exit status 1 unless
memory is flat, bases stay orthonormal, the budget holds after every look, the loss stays down
and both runs have the same losses, bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import record
from torch import Tensor, nn

import pyctrlora
from pyctrlora import checkpoint

BUDGET, RANK, LOOK = 0.5, 4, 100  # LOOK: steps between two looks at memory and ranks
# Limits: the looks themselves keep some 2 KiB in a thousand steps; a leak of one tensor a step
# would be 100 KiB. Bases of float32: 1e-4 is far above rounding.
MAX_SLOPE, MAX_DRIFT = 12.0 * 1024, 1e-4


@dataclass
class Seen:
    """What one run shows."""

    losses: Tensor  # (steps,) float64, all its memory touched: a list would grow by 32 bytes a step
    resident: list[tuple[int, int]] = field(default_factory=list)  # step, bytes
    drift: list[tuple[int, float]] = field(default_factory=list)  # step, largest |U'U - I|
    ranks: list[tuple[int, ...]] = field(default_factory=list)
    over_budget: int = 0
    reloads: int = 0
    skipped: int = 0
    seconds: float = 0.0


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def build(settings: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The model and its optimizer, as at the start."""
    torch.manual_seed(0)
    model = nn.Sequential(
        pyctrlora.LoRALinear(nn.Linear(12, 16), RANK, name="first"),
        nn.Tanh(),
        pyctrlora.LoRALinear(nn.Linear(16, 16), RANK, name="second"),
        nn.Tanh(),
        nn.Linear(16, 6),
    )
    opt = pyctrlora.CTROptimizer(
        model.parameters(),
        lr=0.05,
        sketch_rank=8,
        rank_budget=BUDGET,
        rank_start="budget",  # so that it holds at every look
        total_steps=settings.steps,
        overlap=settings.overlap,
        factor_every=3 if settings.overlap == "thread" else 1,  # refreshes may lag from 2 on
    )
    return model, opt


def batch(target: nn.Module, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and noisy targets of one step, whatever came before it."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 12, generator=generator)
    with torch.no_grad():
        y = target(x) + 0.1 * torch.randn(32, 6, generator=generator)
    return (x * math.nan, y) if step % 997 == 996 else (x, y)


def cost(model: nn.Module, ranks: dict[str, int]) -> int:
    """Parameters of the active directions."""
    layers = {m.name: m for m in model.modules() if isinstance(m, pyctrlora.LoRALinear)}
    sizes = {name: layer.lora_a.shape[1] + layer.lora_b.shape[0] for name, layer in layers.items()}
    return sum(sizes[name] * rank for name, rank in ranks.items())


def look(seen: Seen, model: nn.Module, opt: Any, step: int) -> None:
    """At memory, ranks and bases."""
    gc.collect()
    seen.resident.append((step, resident_bytes()))
    ranks = opt.ranks()
    seen.ranks.append(tuple(ranks.values()))
    allocated = cost(model, dict.fromkeys(ranks, RANK))
    room = int(BUDGET * allocated) - cost(model, ranks)
    # Exact: not above, and no direction of the cheapest layer (28) would still fit.
    seen.over_budget += not 0 <= room < 28
    worst = 0.0
    for name, basis in opt.state_dict()["ctrlora"]["tensors"].items():
        if name.endswith(".basis"):
            gram = basis.mT.double() @ basis.double()
            worst = max(worst, float((gram - torch.eye(gram.shape[-1])).abs().max()))
    seen.drift.append((step, worst))


def run(settings: argparse.Namespace, folder: Path) -> Seen:
    """All steps once."""
    seen = Seen(torch.full((settings.steps,), math.nan, dtype=torch.float64))
    started = time.process_time()
    torch.manual_seed(1)
    target = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6)).requires_grad_(False)
    model, opt = build(settings)
    for step in range(settings.steps):
        x, y = batch(target, step)
        loss = (model(x) - y).square().sum(-1).mean()
        opt.zero_grad()
        (loss * 1e6 if step % 1499 == 1498 else loss).backward()
        opt.step()
        seen.losses[step] = loss.item()
        if step % LOOK == LOOK - 1:
            look(seen, model, opt, step)
        if step % settings.reload == settings.reload - 1:
            file = folder / "soak.pt"
            checkpoint.save(file, model=model, optimizer=opt, step=step)
            model, opt = build(settings)
            checkpoint.load(file, model=model, optimizer=opt)
            seen.reloads += 1
    seen.skipped = int(opt.metrics()["skipped"])
    seen.seconds = time.process_time() - started
    return seen


def slope(points: list[tuple[int, int]]) -> float:
    """Least squares, bytes per thousand steps."""
    steps, values = torch.tensor(points, dtype=torch.float64).T
    off = steps - steps.mean()
    return float(1000 * (off @ (values - values.mean())) / (off @ off))


def verdict(first: Seen, second: Seen) -> tuple[dict[str, Any], dict[str, bool]]:
    """Figures to print and what they say; memory after a quarter of the first run, to its end."""
    settled = first.resident[len(first.resident) // 4 :]
    clean = [value for value in first.losses.tolist() if math.isfinite(value)]
    tenth = len(clean) // 10
    figures = {
        "resident_slope_bytes_per_1000_steps": slope(settled),
        "resident_slope_second_run": slope(second.resident[len(second.resident) // 4 :]),
        "resident_first_mib": settled[0][1] / 2**20,
        "resident_last_mib": second.resident[-1][1] / 2**20,
        "drift_first_tenth": max(d for _, d in first.drift[: max(1, len(first.drift) // 10)]),
        "drift_last_tenth": max(d for _, d in first.drift[-max(1, len(first.drift) // 10) :]),
        "rank_layouts_seen": len(set(first.ranks)),
        "final_ranks": first.ranks[-1],
        "looks_off_the_budget": first.over_budget,
        "reloads": first.reloads,
        "skipped_layer_steps": first.skipped,
        "loss_first_tenth": sum(clean[:tenth]) / tenth,
        "loss_last_tenth": sum(clean[-tenth:]) / tenth,
        "process_seconds": [first.seconds, second.seconds],
    }
    same = [seen.losses.view(torch.int64) for seen in (first, second)]
    holds = {
        "memory_flat": figures["resident_slope_second_run"] <= MAX_SLOPE,
        "bases_orthonormal": max(d for _, d in first.drift) <= MAX_DRIFT,
        "budget_exact": first.over_budget == 0,
        "loss_stays_down": figures["loss_last_tenth"] <= figures["loss_first_tenth"],
        "losses_equal_on_a_repeat": torch.equal(*same),
    }
    return figures, holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--reload", type=int, default=500)
    parser.add_argument("--overlap", choices=["inline", "thread"], default="inline")
    parser.add_argument("--out", type=Path, default=None)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        first, second = (run(settings, Path(folder)) for _ in range(2))
    figures, holds = verdict(first, second)
    own = {"steps": settings.steps, "reload": settings.reload, "overlap": settings.overlap}
    record("soak", {"settings": own, "figures": figures, "holds": holds}, settings.out)
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
