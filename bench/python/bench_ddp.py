"""What CTROptimizer sends under DDP, against DDP's own gradients: bytes and calls per step.

python bench/python/bench_ddp.py   (about 7 min; writes bench/results/ddp.json)

Two processes over gloo. Bytes are those handed to all_reduce by one process; a ring moves
2 (P - 1) / P times as many through each one, ours and DDP's alike, so the share does not depend on
P. Sums are proportional to the layers' width, as gradients are; the maps that owners of refreshes
send are not, and are sent where they are at most an eighth of the sums: here up to r = 32.

"refreshes": what dividing them between processes brings. In one process, 56 pairs of a 7B model's
shapes, one thread, r = k of 16 and 64, over a `step()` in which no layer is refreshed: one in which
a twelfth is, the schedule of several processes ("twelfths"), and the same in a process that owns
one of 2 or 8 shares (exchanges that take no time).
"""

# No postponed annotations: DDP reads those of the hook.
import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import interleaved, ratios, record
from jobs import SHAPES, observing
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import pyctrlora

WIDTH, LAYERS, ROWS = 1536, 2, 32
TARGET = 0.05


class Traffic:
    """Counts what one process hands to collectives."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.ours = self.calls = self.gradients = 0
        self.stepping = False

    def count_ours(self) -> None:
        """From now on calls of `dist.all_reduce` within steps; DDP's hook calls it in backward."""
        original = dist.all_reduce

        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.ours += tensor.nbytes * self.stepping
            self.calls += self.stepping
            return original(tensor, *args, **kwargs)

        dist.all_reduce = counted

    def hook(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DDP's own reduction, counted."""
        self.gradients += bucket.buffer().nbytes
        return allreduce_hook(state, bucket)


def train(number: int, count: int, folder: str, case: dict[str, Any]) -> None:
    """One process of a run; the first one writes what was sent."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=count
    )
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]
    net = pyctrlora.add_lora(nn.Sequential(*layers), rank=case["rank"])
    model = DistributedDataParallel(net)
    traffic = Traffic()
    model.register_comm_hook(None, traffic.hook)
    steps = case["steps"]
    options = {"rank_budget": 0.5, "total_steps": steps} if case["rank_budget"] else {}
    opt = pyctrlora.CTROptimizer(model.named_parameters(), lr=0.05, **options)
    traffic.count_ours()
    torch.manual_seed(number)
    largest = 0
    for _ in range(steps):
        before = traffic.ours
        x = torch.randn(ROWS, WIDTH)
        opt.zero_grad()
        (model(x) - x.flip(-1)).square().mean().backward()
        traffic.stepping = True
        opt.step()
        traffic.stepping = False
        largest = max(largest, traffic.ours - before)
    if number == 0:
        gradients = traffic.gradients / steps
        found = {
            **case,
            "gradient_bytes_per_step": gradients,
            "our_bytes_per_step": traffic.ours / steps,
            "share": traffic.ours / traffic.gradients,
            "largest_step_share": largest / gradients,
            "our_tensors_per_step": traffic.calls / steps,
        }
        Path(folder, "found.json").write_text(json.dumps(found), "utf-8")
    dist.destroy_process_group()


def measure(case: dict[str, Any], count: int) -> dict[str, Any]:
    """One run in `count` processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (count, folder, case), nprocs=count)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text("utf-8"))
    print(
        f"rank {case['rank']:3d}, budget {case['rank_budget']!s:5}: {found['share']:.1%} of DDP's "
        f"gradients, at most {found['largest_step_share']:.0%} in one step"
    )
    return found


def refreshes(rank: int, rounds: int) -> dict[str, dict[str, float]]:
    """`step()` with a twelfth of the layers refreshed, or a share of them, over one without."""
    torch.set_num_threads(1)
    runs, prepare = {}, {}
    cases = {"twelfths": (12, 1), "of 2": (12, 2), "of 8": (12, 8), "none": (10**6, 1)}
    for name, (every, count) in cases.items():
        optimizer, prepare[name] = observing(SHAPES, rank, factor_every=every, exchange_every=every)
        if count > 1:
            engine = optimizer._roster.engine
            engine.set_processes(lambda _: None, 0, count)
        runs[name] = optimizer.step
    times = interleaved(runs, rounds, prepare=prepare)
    found = {name: ratios(times, name, "none") for name in cases if name != "none"}
    for name, ratio in found.items():
        print(f"r = {rank}, refreshes {name}: {ratio['median']:.2f} of a step without")
    return found


def main() -> None:
    """Measures each case and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=36)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    cases = [(8, False), (16, False), (16, True), (32, False), (64, False)]
    runs = [
        measure({"rank": rank, "rank_budget": budget, "steps": args.steps}, args.processes)
        for rank, budget in cases
    ]
    model = {"width": WIDTH, "layers": LAYERS, "processes": args.processes}
    refreshing = {f"r={rank}": refreshes(rank, args.rounds) for rank in (16, 64)}
    found = {"model": model, "target": TARGET, "runs": runs, "refreshes": refreshing}
    record("ddp", found, args.out)


if __name__ == "__main__":
    main()
