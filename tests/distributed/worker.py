"""One process of a run for test_ddp.py: `python worker.py SCENARIO FOLDER RANK COUNT`.

Writes what it ended with to FOLDER/rank<RANK>.pt, or its error to FOLDER/rank<RANK>.txt.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pyctrlora

ROWS = 24


class Net(nn.Module):
    def __init__(self, rank: int = 3, seed: int = 0, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 5)
        self.double()
        pyctrlora.add_lora(self, rank=rank, targets=["first", "second"])
        nn.init.normal_(self.first.lora_b, std=0.3)
        nn.init.normal_(self.second.lora_b, std=0.3)
        self.head.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return out


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    target = torch.Generator().manual_seed(99)
    y = torch.tanh(x @ torch.randn(6, 5, generator=target, dtype=torch.float64))
    return x, y


def share(scenario: str, step: int, rank: int, count: int) -> slice:
    """The rows of this process."""
    if scenario == "uneven" and step % 5 == 4:  # a short last batch: rows for some only
        edges = [0, *(ROWS - 4 + r for r in range(count - 1)), ROWS]
        return slice(edges[rank], edges[rank + 1])
    if scenario == "no rows" and step % 3 == 2:  # the last process has none
        size = ROWS // (count - 1)
        return slice(rank * size, (rank + 1) * size) if rank < count - 1 else slice(0, 0)
    size = ROWS // count
    return slice(rank * size, (rank + 1) * size)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    error = (model(x) - y).square().sum(-1)
    return error.mean() if len(x) else error.sum()


def weights(scenario: str, step: int, count: int) -> list[float]:
    """How much each process' rows count in DDP's loss: the mean of the processes' means."""
    sizes = [len(range(*share(scenario, step, r, count).indices(ROWS))) for r in range(count)]
    return [1 / (count * size) if size else 0.0 for size in sizes]


def options_of(scenario: str) -> dict[str, Any]:
    # As often as one process, so that runs can be compared.
    options: dict[str, Any] = {"lr": 0.1, "fallback_lr": 0.01}
    options |= {"factor_every": 3, "exchange_every": 3}
    if scenario.startswith("sketch"):  # neither all rows nor all directions
        options |= {"sketch_rank": 3, "sample_rows": 5}
    if scenario == "head":  # bound by it on each step
        options |= {"head_radius": 0.01, "lr": 1.0}
    if scenario == "sketch, seldom":  # the defaults
        options |= {"factor_every": 1, "exchange_every": 12}
    if scenario.startswith("ranks"):  # events after steps 10, 18, ..., 178
        options |= {"rank_budget": 0.7, "total_steps": 200}
    return options


def optimizer_of(scenario: str, model: nn.Module) -> pyctrlora.CTROptimizer:
    if scenario == "head":
        pyctrlora.attach(model)
    opt = pyctrlora.CTROptimizer(model.named_parameters(), **options_of(scenario))
    if scenario.startswith("ranks"):  # the wrong way round, so that directions must move
        names = {layer.split(".")[-1]: layer for layer in opt.ranks()}
        opt.allocate_ranks({names["first"]: [1.0, 0, 0, 0], names["second"]: [1.0] * 4})
    return opt


def net_of(scenario: str) -> Net:
    # Wide ones have owners of refreshes: their maps are small beside their sums.
    rank = 4 if scenario.startswith("ranks") else 3
    return Net(rank=rank, width=80 if scenario.endswith("wide") else 8)


def built(scenario: str) -> tuple[Net, DistributedDataParallel, pyctrlora.CTROptimizer]:
    net = net_of(scenario)
    model = DistributedDataParallel(net)
    return net, model, optimizer_of(scenario, model)


def interrupted(
    scenario: str, net: Net, opt: pyctrlora.CTROptimizer
) -> tuple[Net, DistributedDataParallel, pyctrlora.CTROptimizer]:
    """Anew from what was saved, by each process or by the first one."""
    saved = [copy.deepcopy({"model": net.state_dict(), "optimizer": opt.state_dict()})]
    if scenario == "ranks, one file":
        dist.broadcast_object_list(saved, src=0)
    net, model, opt = built(scenario)
    net.load_state_dict(saved[0]["model"])
    opt.load_state_dict(saved[0]["optimizer"])
    return net, model, opt


def train(scenario: str, rank: int, count: int, steps: int) -> dict[str, Any]:
    net, model, opt = built(scenario)
    losses = []
    for step in range(steps):
        if scenario in ("ranks, own files", "ranks, one file") and step in (35, 52):
            net, model, opt = interrupted(scenario, net, opt)
        x, y = batch(step)
        own = share(scenario, step, rank, count)
        parts = [own]
        if scenario == "no_sync":
            middle = (own.start + own.stop) // 2
            parts = [slice(own.start, middle), slice(middle, own.stop)]
        opt.zero_grad()
        for index, part in enumerate(parts):
            with nullcontext() if index == len(parts) - 1 else model.no_sync():
                (loss_of(model, x[part], y[part]) / len(parts)).backward()
        opt.step()
        with torch.no_grad():
            losses.append((net(x) - y).square().sum(-1).mean().item())
    return ended(net, opt, losses)


def alone(scenario: str, count: int, steps: int) -> dict[str, Any]:
    """The same run in one process on the joined batch."""
    net = net_of(scenario)
    opt = optimizer_of(scenario, net)
    losses = []
    for step in range(steps):
        x, y = batch(step)
        opt.zero_grad()
        error = (net(x) - y).square().sum(-1)
        total = torch.zeros((), dtype=torch.float64)
        for rank, weight in enumerate(weights(scenario, step, count)):
            total = total + weight * error[share(scenario, step, rank, count)].sum()
        total.backward()
        opt.step()
        with torch.no_grad():
            losses.append((net(x) - y).square().sum(-1).mean().item())
    return ended(net, opt, losses)


def ended(net: Net, opt: pyctrlora.CTROptimizer, losses: list[float]) -> dict[str, Any]:
    parameters = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    products = {
        name: layer.lora_b.detach() @ layer.lora_a.detach()
        for name, layer in (("first", net.first), ("second", net.second))
    }
    return {
        "parameters": parameters,
        "products": products,
        "losses": losses,
        "metrics": opt.metrics(),
        "ranks": opt.report()["history"],
        "state": {n: t.clone() for n, t in opt.state_dict()["ctrlora"]["tensors"].items()},
    }


def disagree(scenario: str, rank: int) -> None:
    """Steps with something that differs between the processes."""
    net = Net(rank=4 if scenario == "another rank" and rank == 1 else 3)
    options = {"damping": 0.1} if scenario == "another option" and rank == 1 else {}
    if scenario == "another head" and rank == 1:
        pyctrlora.attach(net)
    opt = pyctrlora.CTROptimizer(net.named_parameters(), **options)
    x, y = batch(0 if scenario != "no ddp" else rank)
    loss_of(net, x, y).backward()
    before = [p.detach().clone() for p in net.parameters()]
    try:
        opt.step()
    finally:
        assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def lost(folder: Path, rank: int, steps: int) -> None:
    """The last process dies between its backward and its step: its gradients were still sent."""
    _, model, opt = built("plain")
    for step in range(steps):
        x, y = batch(step)
        opt.zero_grad()
        loss_of(model, x, y).backward()
        if step == 9 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        opt.step()
        (folder / f"steps{rank}.txt").write_text(str(step + 1))


def resume(folder: Path, rank: int, count: int, steps: int) -> dict[str, Any]:
    """Goes on with the state of a run by another number of processes."""
    saved = torch.load(folder / "saved.pt", weights_only=True)
    net = Net()
    model = DistributedDataParallel(net)
    opt = pyctrlora.CTROptimizer(model.named_parameters(), **options_of("plain"))
    net.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    for step in range(steps, 2 * steps):
        x, y = batch(step)
        own = share("plain", step, rank, count)
        opt.zero_grad()
        loss_of(model, x[own], y[own]).backward()
        opt.step()
    return ended(net, opt, [])


def main() -> None:
    scenario, folder, rank, count, steps = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    torch.set_num_threads(1)
    file = f"file://{folder / 'rendezvous'}"
    dist.init_process_group(
        "gloo", init_method=file, rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    try:
        if scenario in ("another rank", "another option", "another head", "no ddp"):
            disagree(scenario, rank)
        elif scenario == "lost":
            lost(folder, rank, steps)
        elif scenario == "resume":
            torch.save(resume(folder, rank, count, steps), folder / f"rank{rank}.pt")
        else:
            torch.save(train(scenario, rank, count, steps), folder / f"rank{rank}.pt")
    except ValueError as error:
        (folder / f"rank{rank}.txt").write_text(str(error))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
