"""transformers' Trainer, and TRL's, which are Trainers.

Example::

    trainer = Trainer(model, args, train_dataset=data,
                      optimizer_cls_and_kwargs=(CTROptimizerFactory, {"lr": 0.1}))
    CTRCallback(CsvWriter("run/metrics.csv")).add_to(trainer)
    trainer.train(resume_from_checkpoint=True)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from pyctrlora.files import replacing
from pyctrlora.optimizer import CTROptimizer
from pyctrlora.writers import tagged

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

    from pyctrlora.writers import Writer

RANKS_FILE = "ctrlora_ranks.json"


class CTROptimizerFactory:
    """For `Trainer(optimizer_cls_and_kwargs=(CTROptimizerFactory, {...}))`.

    The Trainer hands parameters without names and without a model to an optimizer's class, but the
    model itself to a factory: so the layers are attached, observed and known by name.
    `learning_rate` and `weight_decay` of TrainingArguments do not apply, since they mean AdamW's;
    its schedule does.
    """

    def __call__(self, model: nn.Module, **settings: Any) -> CTROptimizer:
        """`CTROptimizer.from_model(model, **settings)`."""
        return CTROptimizer.from_model(model, **settings)


class CTRCallback(TrainerCallback):  # type: ignore[misc]  # untyped base
    """Logs `metrics()` whenever the Trainer logs, and saves the ranks with each checkpoint.

    The numbers join the Trainer's own under "ctrlora/": in `trainer.state.log_history`, and, if
    the callback was added by `add_to`, in TensorBoard, W&B and whatever else `report_to` names.
    Under float16 it also tells the optimizer the loss scale, without which the predicted KL is too
    large by the scale's square and the steps too short.

    Args:
        *writers: further places, e.g. `pyctrlora.writers.CsvWriter("metrics.csv")`.
    """

    def __init__(self, *writers: Writer) -> None:
        """See the class."""
        self.writers = writers

    def add_to(self, trainer: Any) -> Self:
        """Adds itself before the reporting callbacks, so that they see its numbers."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follows the GradScaler, if there is one."""
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        optimizer = _unwrap(kwargs.get("optimizer"))
        if optimizer is not None and scaler is not None:
            optimizer.follow_loss_scale(scaler.get_scale)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Adds the numbers to training logs (those with a loss)."""
        optimizer = _unwrap(kwargs.get("optimizer"))
        if optimizer is None or not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        metrics = optimizer.metrics()
        for writer in self.writers:
            writer.write({"loss": logs["loss"], **metrics}, state.global_step)
        logs.update(tagged(metrics))
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(tagged(metrics))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the rank of each layer beside the adapter."""
        optimizer = _unwrap(kwargs.get("optimizer"))
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if optimizer is None or not state.is_world_process_zero or not folder.is_dir():
            return
        with replacing(folder / RANKS_FILE) as temporary:
            temporary.write_text(json.dumps(optimizer.ranks(), indent=1), "utf-8")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the writers."""
        for writer in self.writers:
            writer.close()


def _unwrap(optimizer: Any) -> CTROptimizer | None:
    """Out of accelerate's wrapper; None for another optimizer."""
    while optimizer is not None and not isinstance(optimizer, CTROptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
