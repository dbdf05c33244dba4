"""The house rules as tests: sizes, include directions, where things may be named, complete lists.

The rules stand in CONTRIBUTING.md. Each check returns the offences, so that a failure names them.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import lizard
import pytest

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = ROOT / "cpp" / "include" / "ctrlora"
SOURCES = ROOT / "cpp" / "src"

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = {
    "cpp/**/*.h": 200,
    "bindings/*.h": 200,
    "cpp/**/*.cpp": 400,
    "bindings/*.cpp": 400,
    "bench/cpp/*.cpp": 400,
    "tests/**/*.h": 400,
    "tests/**/*.cpp": 400,
    "tests/**/*.py": 400,
    "tests/reference/*.py": 300,
    "pyctrlora/**/*.py": 300,
    "bench/python/*.py": 300,
}

# Headers without behaviour of their own: the umbrella, the export macro, two constants.
UNTESTED_HEADERS = {"ctrlora", "export", "version"}

# For C++ programs: the engine as torch's own optimizer and module.
SHELLS = {"ctr_optimizer", "lora_module"}

# torch's umbrella headers cost 10 to 21 s per file.
UMBRELLAS = r"torch/(torch|all|types|extension)\.h|ATen/ATen\.h"
FORBIDDEN_INCLUDES = {
    "cpp": rf"{UMBRELLAS}|Python\.h|pybind11/|torch/python|torch/csrc/utils/|cuda|hip/|bindings",
    "bindings": rf"{UMBRELLAS}|detail/|cuda|hip/",
}

# Reading a device number waits for the device. Only what is not on the training path may do it.
MAY_SYNC = {
    "ctrlora::Engine::metrics": "reading metrics is the documented sync",
    "ctrlora::Engine::load": "restores a checkpoint",
    "ctrlora::Engine::end_trial": "a checked step compares two losses; off by default",
    "ctrlora::CTROptimizer::check_step": "the same",
    "ctrlora::HutchinsonProbe::HutchinsonProbe": "a probe reads one number; off by default",
    "ctrlora::HutchinsonProbe::traces": "the same",
    "ctrlora::detail::unusable": "checks what is restored",
    "ctrlora::detail::unusable_spectrum": "the same",
    "ctrlora::CgInit::load": "restores a calibration",
    "ctrlora::TrustRegionSubproblem::solve": "a value type for use alone; no step calls it",
}
SYNC = re.compile(r"\.item\b|_local_scalar_dense")

# What only side_stream may name.
CONCURRENCY = re.compile(
    r"c10/core/(Stream|Event|StreamGuard)|c10::(Stream|Event|impl::\w*Stream)|VirtualGuardImpl"
    r"|record_stream|std::(jthread|thread|async|future|condition_variable)|<(thread|future)>"
)


def files(*patterns: str) -> list[Path]:
    """Files of the project that match; a pattern may match none, all together may not."""
    found = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
    assert found, f"no file matches {patterns}"
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text("utf-8"), re.MULTILINE)


def cpp_functions(path: Path) -> list[lizard.FunctionInfo]:
    return lizard.analyze_file(str(path)).function_list


def cmake_list(path: str, pattern: str) -> set[str]:
    return set(re.findall(pattern, (ROOT / path).read_text("utf-8"), re.MULTILINE))


@pytest.mark.parametrize(("pattern", "limit"), MAX_FILE_LINES.items())
def test_file_sizes(pattern: str, limit: int) -> None:
    sizes = {name(p): len(p.read_text("utf-8").splitlines()) for p in ROOT.glob(pattern)}
    assert not {file: lines for file, lines in sizes.items() if lines > limit}


def test_cpp_function_sizes() -> None:
    sizes = {
        f"{name(path)}: {function.name}": function.end_line - function.start_line + 1
        for path in files("cpp/**/*.h", "cpp/**/*.cpp", "bindings/*.cpp", "tests/cpp/*.cpp")
        for function in cpp_functions(path)
    }
    assert len(sizes) > 50, "lizard found hardly any function"
    assert not {function: lines for function, lines in sizes.items() if lines > MAX_FUNCTION_LINES}


def test_python_function_sizes() -> None:
    sizes = {
        f"{name(path)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in files("pyctrlora/**/*.py", "bench/**/*.py", "tests/**/*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {function: lines for function, lines in sizes.items() if lines > MAX_FUNCTION_LINES}


@pytest.mark.parametrize("layer", FORBIDDEN_INCLUDES)
def test_include_directions(layer: str) -> None:
    forbidden = re.compile(FORBIDDEN_INCLUDES[layer], re.IGNORECASE)
    offences = [
        f"{name(path)} includes {header}"
        for path in files(f"{layer}/**/*.h", f"{layer}/**/*.cpp")
        for header in includes(path)
        if forbidden.search(header)
    ]
    assert not offences


def test_public_headers_stand_alone() -> None:
    offences = [
        f"{name(path)} includes {header}"
        for path in files("cpp/include/ctrlora/*.h")
        for header in includes(path)
        if not header.startswith(("ctrlora/", "ATen/core/", "c10/")) and "/" in header
        if not (path.stem in SHELLS and header.startswith(("torch/optim/", "torch/nn/")))
    ]
    assert not offences


def test_only_the_umbrella_includes_the_shells() -> None:
    """torch's optimizer and module cost seconds; the engine's users do not pay for them."""
    shells = {f"ctrlora/{stem}.h" for stem in SHELLS}
    for path in files("cpp/include/**/*.h", "cpp/src/**/*.*", "bindings/*.*"):
        if path.stem not in {"ctrlora", *SHELLS}:
            assert not shells & set(includes(path)), name(path)


def test_python_has_no_linear_algebra() -> None:
    """Numerics live in cpp/; the demo's model is a model, not numerics of ours."""
    named = re.compile(r"torch\.(linalg|bmm|mm|matmul|einsum|svd|qr|cholesky|inverse|pinverse)\b")
    offences = []
    for path in files("pyctrlora/**/*.py"):
        if "demo" in path.parts:
            continue
        text = path.read_text("utf-8")
        products = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.MatMult)]
        if products or named.search(text):
            offences.append(name(path))
    assert not offences


def test_host_syncs_only_off_the_training_path() -> None:
    offences = []
    for path in files("cpp/src/**/*.cpp", "cpp/src/**/*.h", "cpp/include/**/*.h"):
        allowed = {
            line
            for function in cpp_functions(path)
            if function.name.replace("CTRLORA_API", "") in MAY_SYNC
            for line in range(function.start_line, function.end_line + 1)
        }
        lines = enumerate(path.read_text("utf-8").splitlines(), start=1)
        offences += [
            f"{name(path)}:{number}: {text.strip()}"
            for number, text in lines
            if SYNC.search(text.split("//")[0]) and number not in allowed
        ]
    assert not offences


def test_only_side_stream_names_streams_and_threads() -> None:
    offences = [
        f"{name(path)}:{number}: {text.strip()}"
        for path in files("cpp/**/*.h", "cpp/**/*.cpp", "bindings/*.cpp")
        if path.stem != "side_stream"
        for number, text in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if CONCURRENCY.search(text.split("//")[0])
    ]
    assert not offences


def test_every_public_header_has_a_source_and_a_test() -> None:
    headers = {path.stem for path in files("cpp/include/ctrlora/*.h")} - UNTESTED_HEADERS
    assert headers <= {path.stem for path in files("cpp/src/*.cpp")}
    assert headers <= {path.stem.removesuffix("_test") for path in files("tests/cpp/*_test.cpp")}


def test_umbrella_header_is_complete() -> None:
    umbrella = {Path(header).stem for header in includes(PUBLIC / "ctrlora.h")}
    assert umbrella == {path.stem for path in PUBLIC.glob("*.h")} - {"ctrlora", "export"}


def test_cmake_lists_are_complete() -> None:
    sources = {path.relative_to(SOURCES.parent).as_posix() for path in files("cpp/src/**/*.cpp")}
    assert cmake_list("cpp/CMakeLists.txt", r"^\s+(src/\S+\.cpp)\)?$") == sources
    bindings = {path.name for path in files("bindings/*.cpp")}
    assert cmake_list("bindings/CMakeLists.txt", r"^\s+(\w+\.cpp)\)?$") == bindings
    tests = {path.name for path in files("tests/cpp/*_test.cpp")}
    assert cmake_list("tests/CMakeLists.txt", r"^\s+(\w+_test\.cpp)\)?$") == tests


def test_versions_agree() -> None:
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    header = re.search(r'kVersion = "(.+)"', (PUBLIC / "version.h").read_text("utf-8"))
    assert project
    assert header
    assert project[1] == header[1]


def public_names(members: object) -> set[str]:
    return {member for member in dir(members) if not member.startswith("_")}


def test_stub_names_are_current() -> None:
    """`./dev stubs --check` compares every signature; this sees a missing name at once."""
    from pyctrlora import _C

    stub = ast.parse((ROOT / "pyctrlora" / "_C.pyi").read_text("utf-8"))
    definitions = [n for n in stub.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    constants = [n.target.id for n in stub.body if isinstance(n, ast.AnnAssign)]
    stubbed = {n.name for n in definitions} | set(constants)
    assert {n for n in stubbed if not n.startswith("_")} == public_names(_C)
    for node in definitions:
        if not isinstance(node, ast.ClassDef):
            continue
        inside = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        inside |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
        real = vars(getattr(_C, node.name)).keys()
        assert {n for n in inside if n[0] != "_"} == {n for n in real if n[0] != "_"}, node.name
