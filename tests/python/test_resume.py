"""A run that is killed at any moment, within a save too, goes on bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pyctrlora
from pyctrlora import CTROptimizer, checkpoint

PROGRAM = Path(__file__).with_name("resume_program.py")
STEPS = 12


def run(path: Path, *kill: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), str(path), str(STEPS), *kill]
    return subprocess.run(command, capture_output=True, text=True, cwd=sys.prefix)


def losses(output: str) -> dict[int, str]:
    return {int(step): bits for step, bits in (line.split() for line in output.splitlines())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    done = run(tmp_path_factory.mktemp("whole") / "run.pt")
    assert done.returncode == 0, done.stderr
    return losses(done.stdout)


def test_killed_within_saves_and_resumed(whole, tmp_path):
    path = tmp_path / "run.pt"
    seen: dict[int, str] = {}
    # The save is the one of this process; the steps that were saved before are kept each time.
    kills = [("half written", 2), ("before the sync", 1), ("before the rename", 4),
             ("after the rename", 3)]  # fmt: skip
    saved = 0
    for where, at_save in kills:
        done = run(path, where, str(at_save))
        assert done.returncode == -signal.SIGKILL, done.stderr
        new = losses(done.stdout)
        assert min(new) == saved  # neither a step lost nor one done twice
        saved += at_save - (where != "after the rename")
        seen |= new
    done = run(path)
    assert done.returncode == 0, done.stderr
    assert min(losses(done.stdout)) == saved
    assert seen | losses(done.stdout) == whole
    assert {step: whole[step] for step in seen} == seen


def model_of(rank: int = 2) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3), nn.BatchNorm1d(3))
    return pyctrlora.add_lora(model, rank=rank, targets=["0", "1"])


@pytest.mark.parametrize("steps", range(6))
def test_resumed_after_any_step(train, trained, same, tmp_path, steps):
    data = [(torch.randn(9, 6), torch.randn(9, 3)) for _ in range(6)]
    model = model_of()
    opt = CTROptimizer(model.parameters(), balance_every=3)
    train(model, opt, data[:steps])
    checkpoint.save(tmp_path / "run.pt", model=model, optimizer=opt, step=steps)
    train(model, opt, data[steps:])
    again = model_of()
    for own, other in zip(again.parameters(), model.parameters(), strict=True):
        if not own.requires_grad:  # the base comes from elsewhere
            own.data.copy_(other)
    resumed = CTROptimizer(again.parameters(), balance_every=3)
    assert checkpoint.load(tmp_path / "run.pt", model=again, optimizer=resumed)["step"] == steps
    train(again, resumed, data[steps:])
    same(trained(again), trained(model))
    same(dict(again.named_buffers()), dict(model.named_buffers()))


def test_files_of_another_version_or_model_are_refused_before_any_change(trained, same, tmp_path):
    path = tmp_path / "run.pt"
    model = model_of()
    opt = CTROptimizer(model.parameters())
    checkpoint.save(path, model=model, optimizer=opt, step=0)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "version": 0}, tmp_path / "old.pt")
    torch.save([1], tmp_path / "foreign.pt")
    section = {**content["optimizer"]["ctrlora"], "version": 0}
    optimizer = {**content["optimizer"], "ctrlora": section}
    torch.save({**content, "optimizer": optimizer}, tmp_path / "old_optimizer.pt")
    other = model_of(rank=3)
    before = trained(other)
    fresh = CTROptimizer(other.parameters())
    for name, message in {
        "old.pt": "expected '.*old.pt' to be a checkpoint of version 1; got 0. Remedy: load it",
        "foreign.pt": "of version 1; got list",
        "run.pt": r"another model:\n  0.lora_a: expected \(3, 6\); got \(2, 6\)\n  0.lora_b",
    }.items():
        with pytest.raises(ValueError, match=message):
            checkpoint.load(tmp_path / name, model=other, optimizer=fresh)
    same(trained(other), before)
    with pytest.raises(ValueError, match="expected a state dict of version 1; got 0"):
        checkpoint.load(tmp_path / "old_optimizer.pt", model=model, optimizer=opt)
    with pytest.raises(ValueError, match=r"expected \['scaler'\] in '.*run.pt'; got \[\]"):
        checkpoint.load(path, model=model, optimizer=opt, scaler=torch.amp.GradScaler("cpu"))


def test_a_save_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    model = model_of()
    opt = CTROptimizer(model.parameters())
    checkpoint.save(path, model=model, optimizer=opt, step=1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, model=model, optimizer=opt, step=2)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    assert checkpoint.load(path, model=model, optimizer=opt)["step"] == 1
