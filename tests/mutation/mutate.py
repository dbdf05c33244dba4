"""Whether the C++ tests notice small faults: `./dev mutate [FILE ...]`.

Each mutant changes one operator, number or condition of a source, in a copy of it. The core is
linked anew and the tests that speak for the source run. A mutant that all of them pass survives: it
must be listed in `survivors.txt` with the reason why that is right, else this ends with status 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SURVIVORS = Path(__file__).with_name("survivors.txt")
TESTS = {
    "src/trust_region.cpp": ["trust_region", "proposal", "layer_group_step", "engine"],
    "src/gauge.cpp": ["gauge", "layer_group"],
    "src/rank_scheduler.cpp": ["rank_scheduler", "engine_state"],
    "src/detail/rank_planner.cpp": ["rank_scheduler"],
}
SWAPS = [
    (r"(?<![<=>!+\-*/&|])<(?![<=])(?=\s)", "<="),
    (r"<=", "<"),
    (r"(?<=\s)>(?=\s)", ">="),
    (r">=", ">"),
    (r"==", "!="),
    (r"&&", "||"),
    (r"(?<=\s)\+(?=\s)", "-"),
    (r"(?<=\s)-(?=\s)", "+"),
    (r"(?<=\s)\*(?=\s)", "/"),
    (r"(?<=\s)/(?=\s)", "*"),
    (r"\bminimum\b", "maximum"),
    (r"\bmaximum\b", "minimum"),
    (r"\bstd::max\b", "std::min"),
    (r"\bstd::min\b", "std::max"),
    (r"\blogical_and\b", "logical_or"),
    (r"\bceil\b", "floor"),
    (r"\bfloor\b", "ceil"),
    (r"\bmT\(\)", "clone()"),
    (r"\.clamp_min\(0\)", ""),
    (r"\.square\(\)", ""),
    (r"\.sqrt\(\)", ""),
    (r"(?<![\w.])2(?= \*)", "3"),
    (r"(?<![\w.\-])1(?![\w.])", "2"),
    (r"\btrue\b", "false"),
    (r"\bcontinue;", ";"),
]


@dataclass(frozen=True)
class Mutant:
    """One change of one line."""

    file: str
    number: int
    before: str
    after: str

    def key(self) -> str:
        return f"{self.file}: {self.before.strip()} => {self.after.strip()}"


def code_lines(text: str) -> list[tuple[int, str]]:
    """Lines that compute: no comments, includes, checks with their messages."""
    out, in_check = [], False
    for number, line in enumerate(text.splitlines()):
        in_check = in_check or "CTRLORA_CHECK" in line
        plain = line.split("//")[0]
        if (
            plain.strip()
            and not in_check
            and not plain.lstrip().startswith("#")
            and "constexpr const char" not in plain
        ):
            out.append((number, plain))
        in_check = in_check and not plain.rstrip().endswith(");")
    return out


def mutants_of(file: str) -> list[Mutant]:
    text = (ROOT / "cpp" / file).read_text("utf-8")
    found = []
    for number, line in code_lines(text):
        for pattern, new in SWAPS:
            for match in re.finditer(pattern, line):
                if '"' in line[: match.start()] or "template" in line:
                    continue
                changed = line[: match.start()] + new + line[match.end() :]
                found.append(Mutant(file, number, line, changed))
    return found


class Bench:
    """Compiles one source with a build folder's own command and links it with its other objects."""

    def __init__(self, build: Path, folder: Path) -> None:
        self.build, self.folder = build.resolve(), folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.library = self.folder / "libctrlora.so"

    def command(self, target: str) -> str:
        done = subprocess.run(
            ["ninja", "-C", str(self.build), "-t", "commands", target],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.splitlines()[-1]

    def make(self, file: str, text: str) -> bool:
        """The library with this text in place of that source."""
        source = self.folder / Path(file).name
        source.write_text(text, "utf-8")
        own = f"cpp/CMakeFiles/ctrlora.dir/{file}.o"
        mutated = str(source) + ".o"
        compiling = self.command(own).replace(f"-o {own}", f"-o {mutated}")
        compiling = compiling.replace(f"-c {ROOT / 'cpp' / file}", f"-c {source}")
        compiling = compiling.replace(f"-MF {own}.d", f"-MF {mutated}.d")
        linking = self.command("cpp/libctrlora.so").replace(own, mutated)
        linking = linking.replace("-o cpp/libctrlora.so", f"-o {self.library}")
        for command in (compiling, linking):
            if subprocess.run(command, shell=True, cwd=self.build, capture_output=True).returncode:
                return False
        return True

    def passes(self, tests: list[str]) -> bool:
        """The build folder's tests with that library, which the loader looks for first."""
        files = ",".join(f"*/{name}_test.cpp" for name in tests)
        command = [str(self.build / "tests" / "ctrlora_tests"), f"--source-file={files}"]
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                [*command, "--abort-after=1"], capture_output=True, timeout=120, env=environment
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def verdict(self, mutant: Mutant) -> str:
        lines = (ROOT / "cpp" / mutant.file).read_text("utf-8").splitlines()
        lines[mutant.number] = mutant.after
        if not self.make(mutant.file, "\n".join(lines) + "\n"):
            return "does not build"
        return "survived" if self.passes(TESTS[mutant.file]) else "killed"


def explained() -> set[str]:
    """Keys of survivors that are listed; reasons stand in the lines before them, after a #."""
    if not SURVIVORS.exists():
        return set()
    lines = SURVIVORS.read_text("utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=list(TESTS))
    parser.add_argument("--every", type=int, default=1, help="only each so many-th mutant")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "dev")
    settings = parser.parse_args()
    mutants = [m for file in settings.files for m in mutants_of(file)][:: settings.every]
    if settings.list:
        print("\n".join(mutant.key() for mutant in mutants))
        print(f"{len(mutants)} mutants")
        return 0
    bench = Bench(settings.build, ROOT / "build" / "mutation")
    for file in settings.files:
        text = (ROOT / "cpp" / file).read_text("utf-8")
        assert bench.make(file, text) and bench.passes(TESTS[file]), f"{file} fails unchanged"  # noqa: PT018
    counts, survivors, started = {"killed": 0, "survived": 0, "does not build": 0}, [], time.time()
    for number, mutant in enumerate(mutants, start=1):
        verdict = bench.verdict(mutant)
        counts[verdict] += 1
        if verdict == "survived":
            survivors.append(mutant)
            print(f"survived: {mutant.file}:{mutant.number + 1}: {mutant.key()}", flush=True)
        if number % 10 == 0:
            print(
                f"{number} of {len(mutants)}, {time.time() - started:.0f} s: {counts}", flush=True
            )
    known = explained()
    open_ones = [mutant.key() for mutant in survivors if mutant.key() not in known]
    print(f"{counts}; survivors without a reason in {SURVIVORS.name}: {len(open_ones)}")
    print("\n".join(open_ones))
    return 1 if open_ones else 0


if __name__ == "__main__":
    sys.exit(main())
