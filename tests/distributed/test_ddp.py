"""DDP over gloo: every process equal, all together equal to one process on the joined batch."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import worker

import pyctrlora

STEPS = 200
# float64; sums of 24 rows in another order, and 200 steps of a contracting run.
TOLERANCE = 1e-8


def start(scenario: str, folder: Path, count: int, steps: int) -> list[subprocess.Popen[str]]:
    program = Path(worker.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), scenario, str(folder)]
    return [
        subprocess.Popen(
            [*command, str(rank), str(count), str(steps)],
            env=environment, cwd=sys.prefix, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def run(scenario: str, folder: Path, count: int, steps: int = STEPS) -> None:
    processes = start(scenario, folder, count, steps)
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, errors


def results(folder: Path, count: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(count)]


def distance(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> float:
    assert x.keys() == y.keys()
    return max(((x[n] - y[n]).abs().max() / y[n].abs().max()).item() for n in x)


@pytest.mark.parametrize(
    ("scenario", "count", "steps"),
    [
        ("plain", 2, STEPS),
        ("plain", 4, 60),
        ("ranks", 2, STEPS),
        ("ranks", 4, STEPS),
        ("no_sync", 2, 60),
        ("uneven", 4, 60),
        ("no rows", 2, 60),
        ("head", 2, 60),
        ("head", 4, 60),
    ],
)
def test_processes_agree_with_each_other_and_with_one(tmp_path, scenario, count, steps):
    run(scenario, tmp_path, count, steps)
    every = results(tmp_path, count)
    for other in every[1:]:
        for part in ("parameters", "state"):
            for name, tensor in every[0][part].items():
                # Which layers share inputs is seen, or not, locally.
                if not name.endswith(("share_set", "ranks.process")):
                    assert torch.equal(other[part][name], tensor), name
        assert other["losses"] == every[0]["losses"]
    found = every[0]
    assert found["metrics"]["steps"] == steps
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    single = worker.alone(scenario, count, steps)
    assert distance(found["products"], single["products"]) < TOLERANCE
    assert found["ranks"] == single["ranks"]
    if scenario == "ranks":
        assert found["ranks"]["steps"] == [1, *range(10, 181, 8)]
        assert len(set(found["ranks"]["ranks"]["first"])) > 1  # directions have moved
    head = {n: p for n, p in found["parameters"].items() if "head" in n}
    assert distance(head, {n: single["parameters"][n] for n in head}) < TOLERANCE


@pytest.mark.parametrize(
    ("scenario", "count"),
    [("sketch", 2), ("sketch, seldom", 2), ("sketch, wide", 2), ("sketch, wide", 4)],
)
def test_sketches_agree_and_train_as_well_as_one_process(tmp_path, scenario, count):
    """Sampled rows and three of eight directions: equal everywhere, near the single process."""
    run(scenario, tmp_path, count, 60)
    first, *others = results(tmp_path, count)
    for other in others:
        for name, tensor in first["state"].items():
            assert torch.equal(other["state"][name], tensor), name
    single = worker.alone(scenario.replace(", seldom", ""), count, 60)
    if scenario == "sketch":
        assert first["losses"][-1] == pytest.approx(single["losses"][-1], rel=0.25)
    assert first["losses"][-1] < 1.25 * single["losses"][-1]


@pytest.mark.parametrize(
    ("scenario", "named"),
    [
        ("another rank", "process 1, layer 'first': .* [8, 4, 4, 6,"),
        ("another option", "process 1, options: [('damping', 0.1)]; process 0: []"),
        ("another head", "process 1, observed heads: [[5, 8]]; process 0: []"),
        ("no ddp", "process 1, layer 'first': gradients: sums ["),
    ],
)
def test_processes_that_disagree_are_named_in_all_of_them(tmp_path, scenario, named):
    run(scenario, tmp_path, 2)
    messages = [(tmp_path / f"rank{r}.txt").read_text() for r in range(2)]
    assert messages[0] == messages[1]
    assert "expected the same model, options and gradients in all 2 processes" in messages[0]
    for part in named.split(".*"):
        assert part in messages[0]
    assert "DistributedDataParallel" in messages[0]


def test_a_run_is_interrupted_while_directions_are_sought(tmp_path):
    """Each process' own file goes on bit for bit; one file for all loses the others' rows."""
    found = {}
    for scenario in ("ranks", "ranks, own files", "ranks, one file"):
        (folder := tmp_path / scenario).mkdir()
        run(scenario, folder, 2, 70)
        found[scenario] = results(folder, 2)
    whole, own, one = found.values()
    for rank in range(2):
        for name, tensor in whole[rank]["state"].items():
            assert torch.equal(own[rank]["state"][name], tensor), name
    for name, tensor in one[0]["state"].items():
        assert name.endswith("ranks.process") or torch.equal(one[1]["state"][name], tensor), name
    assert one[0]["ranks"] == one[1]["ranks"]
    assert one[0]["losses"][-1] == pytest.approx(whole[0]["losses"][-1], rel=0.25)


@pytest.mark.parametrize("count", [2, 4])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, count):
    steps = 20
    net = worker.Net()
    opt = pyctrlora.CTROptimizer(net.named_parameters(), **worker.options_of("plain"))
    for step in range(2 * steps):
        if step == steps:
            state = {"model": net.state_dict(), "optimizer": opt.state_dict()}
            torch.save(copy.deepcopy(state), tmp_path / "saved.pt")
        x, y = worker.batch(step)
        opt.zero_grad()
        worker.loss_of(net, x, y).backward()
        opt.step()
    run("resume", tmp_path, count, steps)
    expected = worker.ended(net, opt, [])
    for result in results(tmp_path, count):
        assert distance(result["products"], expected["products"]) < TOLERANCE
        assert result["metrics"]["steps"] == 2 * steps


def test_a_lost_process_ends_in_an_error_of_torch_and_not_in_a_hang(tmp_path):
    """The others wait for its sums: the connection that breaks, or the group's timeout, ends it."""
    processes = start("lost", tmp_path, 2, 20)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[1].returncode == -signal.SIGKILL
    assert processes[0].returncode == 1, errors[0]
    assert "all_reduce" in errors[0]
    assert "RuntimeError" in errors[0] or "DistBackendError" in errors[0], errors[0]
    assert (tmp_path / "steps0.txt").read_text() == "9"  # up to there it trained
