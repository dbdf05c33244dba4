"""What the demo leaves behind: a table, a picture, the adapter and a JSON of everything."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from pyctrlora.demo.train import ADAMW, CTR, Comparison, Run

if TYPE_CHECKING:
    from pathlib import Path

    from pyctrlora.demo.job import Job

COLOURS = {ADAMW: "#8a8a8a", CTR: "#c4451c"}


def table(result: Comparison) -> str:
    """The comparison as text, one column an optimizer.

    Args:
        result: of `pyctrlora.demo.train.compare`.
    """
    runs = [result.adamw, result.ctr]
    rows = [["", *(f"{run.optimizer} (lr {run.lr:g})" for run in runs)]]
    rows.append(["validation loss at the start", *(f"{run.losses[0]:.3f}" for run in runs)])
    for quarter in (1, 2, 3, 4):
        index = round(quarter * (len(result.ctr.steps) - 1) / 4)
        label = f"  after {result.ctr.steps[index]} steps ({25 * quarter} %)"
        rows.append([label, *(f"{run.losses[index]:.3f}" for run in runs)])
    rows += _race(result, runs)
    rows.append(["seconds per step", *(f"{median(run.step_seconds):.3f}" for run in runs)])
    rows.append(["  of which step()", *(f"{median(run.optimizer_seconds):.4f}" for run in runs)])
    rows.append(["optimizer state", *(f"{run.state_bytes / 2**20:.2f} MiB" for run in runs)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    name_width, *cell_widths = widths
    lines = [
        "  ".join([name.ljust(name_width), *map(str.rjust, cells, cell_widths)])
        for name, *cells in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", _sweep_line(result)])


def _race(result: Comparison, runs: list[Run]) -> list[list[str]]:
    target = result.adamw.final_loss
    reached = [(float(runs[0].steps[-1]), runs[0].seconds[-1]), runs[1].reaches(target)]
    cells = [["not reached"] * 2 if r is None else [f"{r[0]:.0f}", f"{r[1]:.1f}"] for r in reached]
    if result.step_ratio is not None:
        cells[1][0] += f" ({result.step_ratio:.2f}x)"
    return [
        [f"steps to AdamW's {target:.3f}", *(c[0] for c in cells)],
        ["seconds to it", *(c[1] for c in cells)],
    ]


def _sweep_line(result: Comparison) -> str:
    if len(result.sweep) == 1:
        return f"AdamW ran once, with lr {result.adamw.lr:g} (leave out --quick for a sweep)"
    tried = ", ".join(f"{run.lr:g}: {run.final_loss:.3f}" for run in result.sweep)
    return f"AdamW's final loss by learning rate: {tried}; the table has the best of them"


def as_json(job: Job, result: Comparison, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Job, settings, every run, machine and versions as plain types.

    Args:
        job: what was trained.
        result: of `pyctrlora.demo.train.compare`.
        extra: further entries.
    """
    return {
        "model": job.model,
        "text": job.text,
        "uniform_loss": job.uniform_loss,
        "settings": asdict(result.settings),
        "adamw_lr": result.adamw.lr,
        "adamw_final_loss": result.adamw.final_loss,
        "ctr_final_loss": result.ctr.final_loss,
        "step_ratio": result.step_ratio,
        "runs": [_finite(asdict(run)) for run in (*result.sweep, result.ctr)],
        "machine": machine(),
        **(extra or {}),
    }


def machine() -> dict[str, Any]:
    """Processor and versions that a figure depends on."""
    return {
        "cpu_count": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _finite(run: dict[str, Any]) -> dict[str, Any]:
    # JSON has no infinity; a diverged AdamW run is null there.
    run["losses"] = [None if loss == float("inf") else loss for loss in run["losses"]]
    return run


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content`, indented."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def plot(path: Path, job: Job, result: Comparison) -> None:
    """Draws validation loss against steps and against seconds.

    Args:
        path: of the PNG.
        job: what was trained; its names make the title.
        result: of `pyctrlora.demo.train.compare`.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        FigureCanvasAgg(figure)  # no pyplot: the user's backend and open figures are left alone
        left, right = figure.subplots(1, 2, sharey=True)
        figure.suptitle(f"LoRA fine-tuning on {job.text}", fontsize=11)
        for axes, unit in ((left, "steps"), (right, "seconds")):
            _draw(axes, result, unit)
        left.set_xlabel("training steps")
        right.set_xlabel("training time in seconds, evaluation left out")
        left.set_ylabel("validation loss, nats per token")
        _mark_target(left, result)
        left.legend(frameon=False, loc="upper right")
        figure.savefig(path, dpi=150)


def _draw(axes: Any, result: Comparison, unit: str) -> None:
    for run in result.sweep:
        if run is not result.adamw:
            label = "AdamW, other learning rates" if run is _first_other(result) else None
            axes.plot(getattr(run, unit), run.losses, color="#d5d5d5", lw=1, label=label)
    for run in (result.adamw, result.ctr):
        label = f"{run.optimizer}, lr {run.lr:g}"
        style = {"color": COLOURS[run.optimizer], "lw": 2, "marker": "o", "ms": 3}
        axes.plot(getattr(run, unit), run.losses, label=label, **style)
    axes.axhline(result.adamw.final_loss, color=COLOURS[ADAMW], lw=1, ls=":")
    best = min(result.adamw.final_loss, result.ctr.final_loss)
    start = result.ctr.losses[0]
    margin = 0.05 * max(start - best, 1e-3)  # a diverged AdamW run must not set the scale
    axes.set_ylim(best - margin, start + margin)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)


def _first_other(result: Comparison) -> Run:
    return next(run for run in result.sweep if run is not result.adamw)


def _mark_target(axes: Any, result: Comparison) -> None:
    reached = result.ctr.reaches(result.adamw.final_loss)
    if reached is None:
        return
    axes.plot([reached[0]], [result.adamw.final_loss], color=COLOURS[CTR], marker="D", ms=6)
    axes.annotate(
        f"AdamW's final loss\nin {result.step_ratio:.2f} of its steps",
        (reached[0], result.adamw.final_loss),
        xytext=(-10, 60),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": COLOURS[CTR]},
        color=COLOURS[CTR],
    )
