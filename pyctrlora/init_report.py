"""What `cg_init` found, as values and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyctrlora import _C


@dataclass(frozen=True)
class LayerReport:
    """One layer. The whitened gradient is the mean over the calibration batches of the sketch.

    Attributes:
        name: the layer's name.
        rank: of its adapter.
        kept: directions that came from the gradient; the other ranks are random whitened directions
            at zero B.
        spectrum: the largest singular values of the whitened gradient, noise included.
        split_half: the same without the noise's share: directions from one half of the batches,
            values from the other.
        energy_kept: share in [0, 1] of the whitened gradient's squared norm in the kept directions.
        noise_floor: largest singular value that the noise alone would have.
        effective_samples: independent samples that would give this much noise.
        radius: relative change of the layer's output by the start values; 0 where B = 0.
        rows: rows with a gradient in the sketch; 0: nothing was seen, the adapter is as it was.
    """

    name: str
    rank: int
    kept: int
    spectrum: tuple[float, ...]
    split_half: tuple[float, ...]
    energy_kept: float
    noise_floor: float
    effective_samples: float
    radius: float
    rows: int


@dataclass(frozen=True)
class InitReport:
    """Result of `cg_init`; `print` it for a table.

    Attributes:
        layers: one report per layer, in the model's order.
        mode: as asked for.
        batches: calibration batches.
        statistics_bytes: memory of all statistics at their largest.
        seconds: of wall clock, all in all.
        from_cache: whether the statistics were read instead of computed.
    """

    layers: tuple[LayerReport, ...]
    mode: str
    batches: int
    statistics_bytes: int
    seconds: float
    from_cache: bool

    def __getitem__(self, name: str) -> LayerReport:
        """The report of one layer.

        Raises:
            KeyError: no such layer.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def __str__(self) -> str:
        """A table, one line a layer."""
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [
            f"{'layer':{width}}  kept/rank  largest    floor  energy  samples  radius",
            *(_line(layer, width) for layer in self.layers),
        ]
        source = "from cache" if self.from_cache else f"{self.batches} batches"
        lines.append(
            f"{len(self.layers)} layers, mode {self.mode}, {source}, {self.seconds:.1f} s, "
            f"{self.statistics_bytes / 2**20:.1f} MiB of statistics"
        )
        return "\n".join(lines)


def _line(layer: LayerReport, width: int) -> str:
    if layer.rows == 0:
        return f"{layer.name:{width}}  saw no gradient: its adapter is as it was"
    kept = f"{layer.kept}/{layer.rank}"
    return (
        f"{layer.name:{width}}  {kept:>9}  {layer.spectrum[0]:7.2g}  {layer.noise_floor:7.2g}  "
        f"{layer.energy_kept:6.1%}  {layer.effective_samples:7.0f}  {layer.radius:6.3g}"
    )


def layer_reports(layers: Iterable[_C.LayerInit]) -> tuple[LayerReport, ...]:
    """Plain values from the engine's."""
    return tuple(
        LayerReport(
            name=layer.name,
            rank=layer.a.shape[0],
            kept=layer.kept,
            spectrum=tuple(layer.spectrum.tolist()),
            split_half=tuple(layer.split_half.tolist()),
            energy_kept=layer.energy_kept,
            noise_floor=layer.noise_floor,
            effective_samples=layer.effective_samples,
            radius=layer.radius,
            rows=layer.rows,
        )
        for layer in layers
    )
