"""The running torch must be of the minor version that the extension was compiled against."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import ModuleType

_REMEDY = "Remedy: pip install --no-build-isolation --force-reinstall --no-deps ."


def load_extension() -> ModuleType:
    """Imports `pyctrlora._C`, or says what to do.

    torch keeps its C++ ABI within one minor version only. The version compiled against is read
    from a file that the build wrote, since loading the extension next to another torch may fail
    with an undefined symbol, or crash.

    Raises:
        ImportError: torch is of another minor version, or the extension is missing or cannot load.
    """
    built = _built_with()
    if built is not None:
        _check(built)
    try:
        extension = importlib.import_module("pyctrlora._C")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"[pyctrlora] expected the compiled module pyctrlora._C; got none ({error}). {_REMEDY}"
        ) from error
    except ImportError as error:
        raise ImportError(
            f"[pyctrlora] the extension, built with torch {built or '(unknown)'}, cannot be loaded "
            f"next to torch {torch.__version__}: {error}. {_REMEDY}"
        ) from error
    _check(extension.BUILT_WITH_TORCH)
    return extension


def cmake_folder() -> str:
    """Where the CMake package lies: beside the extension, also for an editable install."""
    extension = importlib.import_module("pyctrlora._C")
    return str(Path(str(extension.__file__)).parent / "share" / "cmake")


def _built_with() -> str | None:
    try:
        version: str = importlib.import_module("pyctrlora._built_with").TORCH
    except ModuleNotFoundError:
        return None
    return version


def _check(built: str) -> None:
    running = str(torch.__version__)
    if running.split(".")[:2] != built.split(".")[:2]:
        raise ImportError(
            f"[pyctrlora] expected torch {'.'.join(built.split('.')[:2])}, which the extension was "
            f"built with; got torch {running}. {_REMEDY}"
        )
