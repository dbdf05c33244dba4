"""A real run under Lightning, which calls step(closure) with the backward inside."""

from __future__ import annotations

import csv
from typing import Any

import pytest
import torch
from torch import nn

import pyctrlora
from pyctrlora.writers import CsvWriter

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Advice about workers, loggers and the like; Lightning's class is not there before its import.
    pytest.mark.filterwarnings(
        r"ignore:.*(does not have many workers|litlogger|srun|exists and is):"
    ),
]


def module() -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
            self.net = pyctrlora.add_lora(net, rank=2, targets=["0", "2"])
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            x, y = batch
            loss = (self.net(x) - y).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            opt = pyctrlora.CTROptimizer.from_model(self, lr=0.1)
            schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=20)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def loader(batch: int = 16) -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(160, 6, generator=generator)
    data = torch.utils.data.TensorDataset(x, 0.2 * x @ torch.randn(6, 3, generator=generator))
    return torch.utils.data.DataLoader(data, batch_size=batch)


def fit(model: Any, folder: Any, steps: int, callbacks: Any = (), **settings: Any) -> Any:
    import lightning

    checkpoint, batch = settings.pop("ckpt_path", None), settings.pop("batch", 16)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        enable_checkpointing=False, **settings,
    )  # fmt: skip
    trainer.fit(model, loader(batch), ckpt_path=checkpoint)
    return trainer


def plain(steps: int, batch: int = 16) -> list[float]:
    """The same run as a loop of one's own."""
    model = module()
    chosen = model.configure_optimizers()
    found: list[float] = []
    while len(found) < steps:
        for x, y in loader(batch):
            if len(found) == steps:
                break
            chosen["optimizer"].zero_grad()
            loss = (model.net(x) - y).square().mean()
            loss.backward()
            chosen["optimizer"].step()
            chosen["lr_scheduler"]["scheduler"].step()
            found.append(loss.item())
    return found


def test_a_run_equals_a_plain_loop_and_is_logged(tmp_path):
    from pyctrlora.integrations.lightning import CTRCallback

    model = module()
    callback = CTRCallback(CsvWriter(tmp_path / "metrics.csv"), every=5)
    trainer = fit(model, tmp_path, 20, [callback])
    assert model.losses == plain(20)
    assert model.losses[-1] < 0.5 * model.losses[0]
    assert trainer.optimizers[0].metrics()["steps"] == 20
    table = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in table] == ["5", "10", "15", "20"]
    assert [float(row["steps"]) for row in table] == [5, 10, 15, 20]
    with pytest.raises(ValueError, match=r"every = 0\. Violated constraint: >= 1"):
        CTRCallback(every=0)


def test_resumed_from_a_checkpoint(tmp_path):
    # One batch an epoch: resumed at an epoch's end, Lightning takes one more batch of that epoch.
    first = module()
    fit(first, tmp_path, 10, batch=160).save_checkpoint(tmp_path / "run.ckpt")
    second = module()
    fit(second, tmp_path, 20, batch=160, ckpt_path=tmp_path / "run.ckpt")
    assert first.losses + second.losses == plain(20, batch=160)


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1},
                                      {"precision": "bf16-mixed"}])  # fmt: skip
def test_other_settings_train(tmp_path, settings):
    model = module()
    fit(model, tmp_path, 20, **settings)
    assert model.losses[-1] < 0.7 * model.losses[0]
