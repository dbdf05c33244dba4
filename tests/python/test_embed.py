"""A foreign C++ project against the installed package: it trains, is killed, resumes, equals us."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import pyctrlora

if TYPE_CHECKING:
    from collections.abc import Callable

PROJECT = Path(__file__).resolve().parent.parent / "embed"
STEPS = 40
CONTEXT = 8

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def program() -> Path:
    """The project of tests/embed, built from a copy by the user's three commands."""
    # Kept between runs: torch's headers alone take half a minute.
    build = Path(__file__).resolve().parents[2] / "build" / "embed-test"
    configure = ["cmake", "-S", str(PROJECT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    prefix = f"-DCMAKE_PREFIX_PATH={pyctrlora.cmake_prefix_path}"
    for command in ([*configure, *ninja, prefix], ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "ctrlora_embed"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's own reference manual, which every interpreter carries."""
    from pydoc_data import topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics.topics.values()), "utf-8")
    assert path.stat().st_size > 300_000
    return path


@pytest.fixture
def start(program: Path, text: Path) -> Callable[..., subprocess.Popen[str]]:
    """`start(checkpoint, pause)`: the program, running."""

    def run(checkpoint: Path, pause: float = 0.0) -> subprocess.Popen[str]:
        command = [str(program), str(text), str(checkpoint), str(STEPS), str(pause)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    return run


def losses_of(output: str) -> dict[int, str]:
    """Bits of the loss by step."""
    return {int(step): bits for step, bits, _ in (line.split() for line in output.splitlines())}


class Model(nn.Module):
    """The twin of tests/embed/main.cpp."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 32).requires_grad_(False)
        self.hidden = pyctrlora.LoRALinear(nn.Linear(CONTEXT * 32, 32), 4, 8.0, "hidden")
        self.deep = pyctrlora.LoRALinear(nn.Linear(32, 32), 4, 8.0, "deep")
        self.head = nn.Linear(32, 256)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x).flatten(1)
        out: Tensor = self.head(torch.tanh(self.deep(torch.tanh(self.hidden(x)))))
        return out


def python_losses(path: Path) -> dict[int, str]:
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = Model()
    pyctrlora.attach(model)  # its head is trained along
    opt = pyctrlora.CTROptimizer(model.parameters(), lr=0.1)
    out = {}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        at = torch.randint(len(data) - CONTEXT, (32,), generator=generator)
        window = data[at[:, None] + torch.arange(CONTEXT + 1)]
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(window[:, :CONTEXT]), window[:, CONTEXT])
        loss.backward()
        opt.step()
        out[step] = struct.pack(">f", loss.item()).hex()
    return out


def test_losses_equal_those_of_python_to_the_last_bit(start, text, tmp_path):
    output, _ = start(tmp_path / "run.pt").communicate()
    losses = losses_of(output)
    assert losses == python_losses(text)
    first, last = (float(line.split()[2]) for line in output.splitlines()[:: STEPS - 1])
    assert last < 0.8 * first


def test_a_killed_program_goes_on_where_it_was(start, tmp_path):
    whole = losses_of(start(tmp_path / "whole.pt").communicate()[0])
    seen: dict[int, str] = {}
    kills = 0
    for delay in (0.05, 0.11, 0.02):  # after its first line: within a step, a save or a pause
        process = start(tmp_path / "killed.pt", 0.01)
        assert process.stdout is not None
        line = process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        kills += process.returncode == -signal.SIGKILL
        new = losses_of(line + rest)
        # A step may be saved and not yet printed, never the other way round.
        assert min(new) <= max(seen, default=-1) + 2
        seen |= new
    assert kills == 3
    assert len(seen) < STEPS
    output, _ = start(tmp_path / "killed.pt").communicate()
    seen |= losses_of(output)
    assert {step: whole[step] for step in seen} == seen
    assert len(seen) >= STEPS - kills
    assert max(seen) == STEPS - 1


def test_a_foreign_project_needs_no_python(program):
    folder = Path(pyctrlora.cmake_prefix_path).parents[1]
    for binary in (folder / "libctrlora.so", program):
        needed = subprocess.run(
            ["readelf", "--dynamic", str(binary)], capture_output=True, text=True, check=True
        ).stdout
        libraries = [line for line in needed.splitlines() if "(NEEDED)" in line]
        assert any("libtorch_cpu" in line for line in libraries)
        assert not [x for x in libraries if "libpython" in x or "torch_python" in x]
    loaded = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True)
    assert "libctrlora.so" in loaded.stdout
    assert "not found" not in loaded.stdout
    assert "python" not in loaded.stdout.replace(sys.prefix, "").replace(
        "site-packages", ""
    ).replace(f"python{sys.version_info[0]}.{sys.version_info[1]}", "")


def test_another_torch_is_named_by_cmake(tmp_path):
    """The package refuses a torch of another minor version and says what to do."""
    fake = tmp_path / "torch"
    fake.mkdir()
    (fake / "TorchConfig.cmake").write_text("set(Torch_FOUND TRUE)\nset(Torch_VERSION 2.99.1)\n")
    done = subprocess.run(
        ["cmake", "-S", str(PROJECT), "-B", str(tmp_path / "build"), f"-DTorch_DIR={fake}",
         f"-DCMAKE_PREFIX_PATH={pyctrlora.cmake_prefix_path}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "found 2.99. Remedy: rebuild ctrlora with that torch" in message


def test_beside_a_cuda_torch_no_toolkit_is_asked_for(tmp_path):
    """torch's own package would ask for a CUDA toolkit; here its stand-in fails when it is read.

    The neighbour is the real torch with an empty libtorch_cuda.so, which a program must load
    although it calls nothing in it: kernels register themselves.
    """
    real = Path(pyctrlora.cmake_prefix_path).parents[1]
    package = tmp_path / "site" / real.name
    shutil.copytree(real / "share", package / "share")
    libraries = tmp_path / "site" / "torch" / "lib"
    libraries.mkdir(parents=True)
    cuda = libraries / "libtorch_cuda.so"
    subprocess.run(["c++", "-shared", "-x", "c++", os.devnull, "-o", cuda], check=True)
    for folder, source in (package, real), (libraries, Path(torch.__file__).parent / "lib"):
        for library in source.glob("lib*.so*"):
            if library.name != cuda.name:
                (folder / library.name).symlink_to(library)
    (package / "include").symlink_to(real / "include")
    (libraries.parent / "include").symlink_to(Path(torch.__file__).parent / "include")
    torchs = libraries.parent / "share" / "cmake" / "Torch"
    torchs.mkdir(parents=True)
    (torchs / "TorchConfig.cmake").write_text('message(FATAL_ERROR "no CUDA toolkit")\n')
    version = torch.__version__.split("+")[0]
    (torchs / "TorchConfigVersion.cmake").write_text(f'set(PACKAGE_VERSION "{version}")\n')
    project = tmp_path / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24...4.4)\nproject(beside LANGUAGES CXX)\n"
        "find_package(ctrlora REQUIRED)\nadd_executable(beside main.cpp)\n"
        "target_link_libraries(beside PRIVATE ctrlora::ctrlora)\n"
    )
    (project / "main.cpp").write_text(
        '#include "ctrlora/engine.h"\n'
        "int main() {\n"
        "  return static_cast<int>(ctrlora::Engine(ctrlora::Options{}).ranks().size());\n}\n"
    )
    build = tmp_path / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={package / 'share' / 'cmake'}"
    for command in (
        ["cmake", "-S", str(project), "-B", str(build), "-DCMAKE_BUILD_TYPE=Debug", prefix],
        ["cmake", "--build", str(build)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    loaded = subprocess.run(["ldd", build / "beside"], capture_output=True, text=True, check=True)
    assert str(cuda) in loaded.stdout
    subprocess.run([build / "beside"], check=True)
