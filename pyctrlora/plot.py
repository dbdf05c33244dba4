"""Pictures of `CTROptimizer.report()`; needs matplotlib, which nothing else imports.

Every function takes the report (or the part that it names) and a path, and writes a picture in the
format of the path's ending.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_LINE, _LIMIT = "#c4451c", "#8a8a8a"
# What a step changes: its label, the metric that bounds it, the axis, what the bound is.
_SHORTENED = "the radius, to which steps are shortened"
_BOUNDS = {
    "predicted_kl": ("predicted KL, nats per term", "kl_radius", "log", _SHORTENED),
    "head_change": ("relative change of heads", "head_radius", "log", _SHORTENED),
    "output_change_mean": (
        "relative change of outputs",
        "lr",
        "linear",
        "lr, the most that is allowed",
    ),
}


def training(report: Mapping[str, Any], path: str | Path) -> None:
    """Loss, and what steps change against its bounds, over the recorded steps.

    Args:
        report: of an optimizer whose `record` was called after steps.
        path: of the picture.

    Raises:
        ValueError: no step was recorded.
    """
    rows = report["training"]
    if not rows["steps"]:
        raise ValueError(
            "[pyctrlora.plot.training] expected recorded steps; got none. Remedy: opt.record(loss) "
            "after opt.step()."
        )
    names = [name for name in ("loss", *_BOUNDS) if name in rows]
    figure, axes = _figure(len(names), height=2.3)
    for ax, name in zip(axes, names, strict=True):
        ax.plot(rows["steps"], _gaps(rows[name]), color=_LINE, lw=1.2)
        ax.set_ylabel(name)
        if name in _BOUNDS:
            label, bound, scale, title = _BOUNDS[name]
            ax.plot(rows["steps"], _gaps(rows[bound]), color=_LIMIT, lw=1, ls="--")
            ax.set_ylabel(label)
            ax.set_yscale(scale)
            ax.set_title(f"dashed: {title}", fontsize=8, loc="right")
    axes[-1].set_xlabel("training steps")
    figure.savefig(path, dpi=150)


def ranks(report: Mapping[str, Any], path: str | Path) -> None:
    """Heat map of active ranks: layers down, the start and the events across.

    Args:
        report: of an optimizer with a rank budget, after its first step.
        path: of the picture.

    Raises:
        ValueError: there is no history.
    """
    steps, by_layer = _history(report, "ranks")
    names = list(by_layer)
    figure, (ax,) = _figure(1, height=max(2.5, 0.19 * len(names) + 1.2))
    image = ax.imshow(
        [by_layer[name] for name in names],
        aspect="auto",
        cmap="viridis",
        vmin=0,
        vmax=max(report["allocated"].values()),
        interpolation="nearest",
    )
    ax.set_yticks(range(len(names)), names, fontsize=7)
    every = max(1, -(-len(steps) // 12))
    ax.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]])
    ax.set_xlabel("ranks after the event at step")
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax, label="active rank", pad=0.02)
    figure.savefig(path, dpi=150)


def budget(report: Mapping[str, Any], path: str | Path) -> None:
    """Parameters of the active directions over the events, and the budget.

    Args:
        report: as for `ranks`.
        path: of the picture.

    Raises:
        ValueError: there is no history.
    """
    steps, _ = _history(report, "budget")
    used = report["history"]["parameters"]
    figure, (ax,) = _figure(1, height=3.0)
    ax.step(steps, used, where="post", color=_LINE, lw=1.8, marker="o", ms=4, label="in use")
    ax.axhline(report["budget"], color=_LIMIT, lw=1, ls="--", label="budget")
    moved = [sum(event["step"] == step for event in report["events"]) for step in steps]
    ax.set_ylim(0, 1.1 * max(*used, report["budget"]))
    for step, value, count in zip(steps, used, moved, strict=True):
        if count:
            ax.annotate(
                f"{count}",
                (step, value),
                xytext=(0, -14),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=_LIMIT,
            )
    ax.set_title("numbers: layers that changed", fontsize=8, loc="right")
    ax.set_xlabel("training steps")
    ax.set_ylabel("adapter parameters")
    ax.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def spectra(
    spectra: Mapping[str, Sequence[float]],
    path: str | Path,
    floors: Mapping[str, float] | None = None,
) -> None:
    """Singular values of whitened gradients by layer, with their noise floors.

    Args:
        spectra: values of each layer, largest first, e.g. from an initialisation's report.
        path: of the picture.
        floors: what noise alone reaches in each layer.

    Raises:
        ValueError: there is no spectrum.
    """
    if not spectra:
        raise ValueError("[pyctrlora.plot.spectra] expected spectra of layers; got none.")
    import matplotlib as mpl

    figure, (ax,) = _figure(1, height=3.6)
    colours = mpl.colormaps["viridis"].resampled(max(2, len(spectra)))
    for number, (name, values) in enumerate(spectra.items()):
        line = {"color": colours(number), "lw": 1.2}
        ax.plot(range(1, len(values) + 1), values, marker=".", label=name, **line)
        if floors and name in floors:
            ax.axhline(floors[name], ls=":", **line)
    ax.set_yscale("log")
    ax.set_xlabel("direction")
    ax.set_ylabel("singular value of the whitened gradient")
    if floors:
        ax.set_title("dotted: noise floors", fontsize=8, loc="right")
    if len(spectra) <= 12:
        ax.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)


def _figure(rows: int, height: float) -> tuple[Any, list[Any]]:
    """A figure outside pyplot: the user's backend and open figures are left alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, 1, squeeze=False, sharex=rows > 1)[:, 0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#eeeeee")
        ax.set_axisbelow(True)
    return figure, axes


def _history(report: Mapping[str, Any], who: str) -> tuple[list[int], dict[str, list[int]]]:
    history = report["history"]
    if not history["steps"]:
        raise ValueError(
            f"[pyctrlora.plot.{who}] expected a history of ranks; got none. Remedy: "
            "CTROptimizer(..., rank_budget=0.5, total_steps=...) and at least one step."
        )
    return history["steps"], history["ranks"]


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
