"""A plain training loop for test_resume.py; kills itself where it is told to.

    python resume_program.py CHECKPOINT STEPS [WHERE AT_SAVE]

Prints "step loss-bits"; WHERE is a moment within the save number AT_SAVE of this process.
"""

import os
import signal
import struct
import sys
from pathlib import Path

import torch
from torch import nn

import pyctrlora
from pyctrlora import checkpoint


def arm(where: str, at_save: int) -> None:
    """The process dies at that moment, as by `kill -9`."""
    saves = 0

    def dies_in(module: object, name: str, before: bool) -> None:
        function = getattr(module, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            result = None if before else function(*args, **kwargs)
            if saves == at_save:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs) if before else result

        setattr(module, name, wrapped)

    real_save = torch.save

    def counted(content: object, file: object) -> None:
        nonlocal saves
        saves += 1
        if where == "half written" and saves == at_save:
            file.write(b"PK\x03\x04 half a checkpoint")  # type: ignore[attr-defined]
            file.flush()  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)
        real_save(content, file)

    torch.save = counted  # type: ignore[assignment]
    if where == "before the rename":
        dies_in(Path, "replace", before=True)
    elif where == "after the rename":
        dies_in(Path, "replace", before=False)
    elif where == "before the sync":
        dies_in(os, "fsync", before=True)


def main() -> None:
    path, steps = Path(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3:
        arm(sys.argv[3], int(sys.argv[4]))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))
    pyctrlora.add_lora(model, rank=2, targets=["0"])
    model[3].requires_grad_(True)
    opt = pyctrlora.CTROptimizer(model.parameters(), lr=0.1, sample_rows=7)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=steps)
    start = 0
    if path.exists():
        restored = checkpoint.load(path, model=model, optimizer=opt, schedule=schedule)
        assert restored["note"] == "plain"
        start = restored["step"]
    for step in range(start, steps):
        x, y = torch.randn(16, 6), torch.randn(16, 3)  # torch's random state resumes too
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        schedule.step()
        print(step, struct.pack(">f", loss.item()).hex(), flush=True)
        checkpoint.save(
            path, model=model, optimizer=opt, step=step + 1, schedule=schedule, note="plain"
        )


if __name__ == "__main__":
    main()
