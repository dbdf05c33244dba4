"""Files that are whole at any time."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end of the block.

    Synced before and after, so a process that dies, or a machine, leaves the old file or the new
    one. If the block raises, the old one stays.

    Args:
        path: in a folder that exists.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "ranks.json"
        >>> with replacing(file) as temporary:
        ...     _ = temporary.write_text("{}")
        >>> file.read_text()
        '{}'
    """
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)  # the rename itself must reach the disk too
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Safetensors tells of a full disk by an exception of its own; outside it is an OSError.

    Raises:
        OSError: in place of safetensors' error.
    """
    import safetensors

    try:
        yield
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
