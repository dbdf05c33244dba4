"""Lightning: `configure_optimizers` returns a `CTROptimizer`; this callback logs its numbers.

Example::

    class Module(lightning.LightningModule):
        def configure_optimizers(self):
            return pyctrlora.CTROptimizer.from_model(self, lr=0.1)

    lightning.Trainer(callbacks=[CTRCallback(every=10)]).fit(Module(), loader)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from pyctrlora.optimizer import CTROptimizer
from pyctrlora.writers import tagged

if TYPE_CHECKING:
    from pyctrlora.writers import Writer


class CTRCallback(Callback):  # type: ignore[misc]  # untyped base
    """Logs `metrics()` to the Trainer's loggers, and to writers of ours.

    Under "16-mixed" it also tells the optimizer the loss scale, without which the predicted KL is
    too large by the scale's square and the steps too short.

    Args:
        *writers: further places, e.g. `pyctrlora.writers.CsvWriter("metrics.csv")`.
        every: steps between two records, at least 1; reading the numbers waits for the device.
    """

    def __init__(self, *writers: Writer, every: int = 10) -> None:
        """See the class."""
        if every < 1:
            raise ValueError(f"[pyctrlora.CTRCallback] every = {every}. Violated constraint: >= 1.")
        self.writers = writers
        self.every = every

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Follows the GradScaler, if there is one."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for optimizer in _ours(trainer):
            if scaler is not None:
                optimizer.follow_loss_scale(scaler.get_scale)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Logs the numbers of this step if it is due."""
        step = trainer.global_step
        if step % self.every != 0 or not trainer.is_global_zero:
            return
        for optimizer in _ours(trainer):
            metrics = optimizer.metrics()
            if metrics["steps"] == 0:
                continue
            for logger in trainer.loggers:
                logger.log_metrics(tagged(metrics), step=step)
            for writer in self.writers:
                writer.write(metrics, step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Closes the writers."""
        for writer in self.writers:
            writer.close()


def _ours(trainer: Any) -> list[CTROptimizer]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, CTROptimizer)]
