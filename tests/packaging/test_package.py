"""What the wheel and the sdist claim. Builds the package anew: minutes, so CI and releases run it.

./dev test tests/packaging
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(1500)


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, made in a clean environment by the backend alone."""
    folder = tmp_path_factory.mktemp("sdist")
    clean = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", clean)
    python = clean / "bin" / "python"
    needs = re.findall(r'^requires = \["(.+)"\]$', (ROOT / "pyproject.toml").read_text(), re.M)
    run(python, "-m", "pip", "--quiet", "install", *needs)
    code = "import sys; from scikit_build_core import build; build.build_sdist(sys.argv[1])"
    run(python, "-c", code, folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist, as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    launcher = {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache"} if shutil.which("ccache") else {}
    sloppy = {"CCACHE_SLOPPINESS": "pch_defines,time_macros"}
    run(*pip, sdist, "--wheel-dir", folder, **launcher, **sloppy)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where that wheel is installed, alone."""
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, wheel)
    return folder


def test_sdist_holds_what_builds_and_tests_it(sdist):
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "dev", "cpp/src/engine.cpp",
                 "bindings/module.cpp", "pyctrlora/_C.pyi", "pyctrlora/py.typed",
                 "tests/embed/main.cpp", "tests/cpp/main.cpp"):  # fmt: skip
        assert (sdist / name).is_file(), name
    assert not (sdist / "build").exists()
    assert not list(sdist.rglob("*.so"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {name.split("/")[0] for name in names}
    assert folders == {"pyctrlora", next(f for f in folders if f.endswith(".dist-info"))}
    for name in ("py.typed", "_C.pyi", "libctrlora.so", "_built_with.py",
                 "include/ctrlora/ctr_optimizer.h", "share/cmake/ctrlora/ctrloraConfig.cmake",
                 "share/cmake/ctrlora/ctrloraTargets.cmake"):  # fmt: skip
        assert f"pyctrlora/{name}" in names, name
    headers = {path.name for path in (ROOT / "cpp" / "include" / "ctrlora").iterdir()}
    installed = {n.split("/")[-1] for n in names if n.startswith("pyctrlora/include/ctrlora/")}
    assert installed == headers
    libraries = [name for name in names if name.endswith(".so") or ".so." in name]
    assert len(libraries) == 2, "torch's libraries are never bundled"


# What every Linux of the manylinux policies has.
SYSTEM = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}


def test_libraries_need_torchs_and_the_systems_and_nothing_else(wheel, tmp_path):
    """As auditwheel with torch's excluded: no others, and no path of the build machine."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    torch = {path.name for path in (Path(__import__("torch").__file__).parent / "lib").iterdir()}
    for library in sorted((tmp_path / "pyctrlora").glob("*.so")):
        dynamic = run("readelf", "--dynamic", "--wide", library)
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
        assert needed - SYSTEM - torch - {"libctrlora.so"} == set(), library.name
        (path,) = re.findall(r"\(RUNPATH\).*\[(.+)\]", dynamic)
        assert set(path.split(":")) <= {"$ORIGIN", "$ORIGIN/../torch/lib"}, library.name


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
    text = archive.read(name).decode()
    lines = text.splitlines()
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: >=3.10" in lines
    needed = [line for line in lines if line.startswith("Requires-Dist:") and "extra" not in line]
    assert sorted(needed) == ["Requires-Dist: numpy>=1.26", "Requires-Dist: torch<2.15,>=2.13"]
    assert "Provides-Extra: integrations" in lines


TRAIN = """
import torch, pyctrlora, pathlib
print(pathlib.Path(pyctrlora.__file__).parent)
print(pyctrlora.cmake_prefix_path)
model = pyctrlora.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=2, targets=["0"])
opt = pyctrlora.CTROptimizer(model.parameters())
for _ in range(3):
    opt.zero_grad()
    model(torch.ones(4, 8)).square().mean().backward()
    opt.step()
print(int(opt.metrics()["steps"]))
"""


def test_installed_wheel_trains_and_cmake_finds_it(site, tmp_path):
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = [{str(site)!r}]\n" + TRAIN]
    packages = str(Path(__import__("torch").__file__).parents[1])
    folder, prefix, steps = run(*command, cwd=tmp_path, PYTHONPATH=packages).split()
    assert Path(folder) == site / "pyctrlora"
    assert Path(prefix) == site / "pyctrlora" / "share" / "cmake"
    assert steps == "3"
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(user LANGUAGES CXX)\n"
        "find_package(ctrlora 0.1 REQUIRED)\n"
        "get_target_property(headers ctrlora::ctrlora INTERFACE_INCLUDE_DIRECTORIES)\n"
        'message(STATUS "headers in ${headers}")\n'
    )
    torch = f"-DTorch_DIR={packages}/torch/share/cmake/Torch"
    found = run(
        "cmake", "-S", tmp_path, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={prefix}", torch
    )
    assert f"headers in {site}/pyctrlora/include" in found


def test_types_are_seen_by_a_type_checker(site, tmp_path):
    (tmp_path / "user.py").write_text(
        "import pyctrlora\nfrom pyctrlora import _C\n"
        "reveal_type(pyctrlora.CTROptimizer.ranks)\nreveal_type(_C.Engine.steps)\n"
    )
    # Silent, as mypy is for a package it finds in site-packages: our sources are checked by our own
    # configuration, which knows the packages that have no types.
    mypy = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    cache = ["--cache-dir", tmp_path / "cache"]
    out = run(*mypy, *cache, tmp_path / "user.py", cwd=tmp_path, MYPYPATH=str(site))
    assert "dict[str, int]" in out.replace("builtins.", "")
    assert "Engine" in out
    assert "Any" not in out


def test_stubs_are_current(tmp_path):
    stubgen = shutil.which("pybind11-stubgen") or str(Path(sys.prefix) / "bin/pybind11-stubgen")
    run(stubgen, "--exit-code", "--output-dir", tmp_path, "pyctrlora._C", cwd=tmp_path)
    made = tmp_path / "pyctrlora" / "_C.pyi"
    ruff = shutil.which("ruff") or str(Path(sys.prefix) / "bin/ruff")
    run(ruff, "format", "--quiet", "--isolated", "--line-length", "100", made)
    own = (ROOT / "pyctrlora" / "_C.pyi").read_text("utf-8").splitlines()
    assert not list(difflib.unified_diff(own, made.read_text("utf-8").splitlines(), lineterm=""))
