"""Where `CTROptimizer.metrics()` can go: a CSV file, TensorBoard. Anything else takes the dict."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pyctrlora.files import replacing

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

PREFIX = "ctrlora/"


class Writer(Protocol):
    """What the callbacks of `pyctrlora.integrations` write to."""

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Records numbers of one step."""

    def close(self) -> None:
        """Flushes; the writer is not used afterwards."""


def tagged(numbers: Mapping[str, float]) -> dict[str, float]:
    """The names as loggers show them: "ctrlora/kl_shrink".

    Example:
        >>> tagged({"steps": 3.0})
        {'ctrlora/steps': 3.0}
    """
    return {PREFIX + name: float(value) for name, value in numbers.items()}


class CsvWriter:
    """One row a step, one column a number, in a file that spreadsheets and pandas read.

    A resumed run goes on in the same file; rows of steps that it takes again are replaced. A name
    that appears later becomes a new column. The file is whole at any time.

    Args:
        path: the file; its folder is made.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.csv"
        >>> writer = CsvWriter(path)
        >>> writer.write({"loss": 2.0}, step=1)
        >>> writer.write({"loss": 1.5, "kl_shrink": 1.0}, step=2)
        >>> print(path.read_text().strip())
        step,loss,kl_shrink
        1,2.0,
        2,1.5,1.0
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads what is there already."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._names: list[str] = []
        self._rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self._names = list(reader.fieldnames or [])[1:]
                self._rows = list(reader)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Adds the row of this step."""
        row = {"step": str(step), **{name: repr(float(x)) for name, x in numbers.items()}}
        kept = [old for old in self._rows if int(old["step"]) < step]
        added = [name for name in numbers if name not in self._names]
        appends = self.path.exists() and not added and len(kept) == len(self._rows)
        self._names += added
        self._rows = [*kept, row]
        if appends:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, ["step", *self._names], lineterminator="\n").writerow(row)
            return
        with (
            replacing(self.path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.DictWriter(file, ["step", *self._names], lineterminator="\n")
            table.writeheader()
            table.writerows(self._rows)

    def close(self) -> None:
        """Nothing is held open."""


class TensorBoardWriter:
    """Scalars under "ctrlora/". Needs `pip install tensorboard`.

    Args:
        folder: the log folder, e.g. "runs/first"; show it by `tensorboard --logdir runs`.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens the event file."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "[pyctrlora.TensorBoardWriter] expected the package tensorboard; got none "
                f"({error}). Remedy: pip install tensorboard, or use CsvWriter."
            ) from error
        self._writer: Any = SummaryWriter(str(folder))

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Adds a scalar for each number."""
        for tag, value in tagged(numbers).items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()
