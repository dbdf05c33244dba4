"""Importing next to another torch, and what the package shows."""

from __future__ import annotations

import subprocess
import sys

import torch

import pyctrlora
from pyctrlora import _C

REMEDY = "pip install --no-build-isolation --force-reinstall --no-deps ."


def run(code: str) -> subprocess.CompletedProcess[str]:
    # Not from the repository: its folder pyctrlora has no compiled module.
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=sys.prefix)


def failure(code: str) -> str:
    done = run(code)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: [pyctrlora] ")
    return last


def test_torch_of_another_minor_version_is_named_before_the_extension_loads():
    message = failure(
        "import sys, torch; torch.__version__ = '2.99.1+cpu'\n"
        "try:\n    import pyctrlora\n"
        "finally:\n    assert 'pyctrlora._C' not in sys.modules"
    )
    minor = ".".join(_C.BUILT_WITH_TORCH.split(".")[:2])
    assert f"expected torch {minor}" in message
    assert "got torch 2.99.1+cpu" in message
    assert REMEDY in message


def test_torch_of_another_patch_version_is_accepted():
    minor = ".".join(_C.BUILT_WITH_TORCH.split(".")[:2])
    done = run(f"import torch; torch.__version__ = '{minor}.99+cu130'; import pyctrlora")
    assert done.returncode == 0, done.stderr


BROKEN = """
import sys, importlib.abc
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "pyctrlora._C":
            raise {error}
sys.meta_path.insert(0, Finder())
import pyctrlora
"""


def test_undefined_symbol_is_explained():
    message = failure(BROKEN.format(error="ImportError('undefined symbol: _ZN2at3mmE')"))
    assert f"built with torch {_C.BUILT_WITH_TORCH}" in message
    assert f"next to torch {torch.__version__}" in message
    assert "undefined symbol: _ZN2at3mmE" in message
    assert REMEDY in message


def test_missing_extension_is_explained():
    message = failure(BROKEN.format(error="ModuleNotFoundError('No module named _C')"))
    assert "expected the compiled module pyctrlora._C" in message
    assert REMEDY in message


def test_neither_peft_nor_transformers_is_imported():
    code = (
        "import sys, torch; before = set(sys.modules); import pyctrlora\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'peft', 'transformers', 'accelerate', 'matplotlib', 'tqdm'}, new"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_public_names_exist():
    assert set(pyctrlora.__all__) <= set(dir(pyctrlora))
