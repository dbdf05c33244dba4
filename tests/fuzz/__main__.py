"""Random inputs guided by coverage: `./dev fuzz TARGET SECONDS`.

Inputs that reach something new are kept in build/fuzz/TARGET; one that is a finding is written to
crash-*, and `python -m fuzz TARGET FILE` repeats it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

# An editable install's finder hands out loaders that atheris cannot look into: Python's own first.
sys.meta_path.sort(key=lambda finder: type(finder).__name__ == "ScikitBuildRedirectingFinder")
with atheris.instrument_imports(include=["pyctrlora", "fuzz"]):
    import torch

    import pyctrlora  # noqa: F401
    from fuzz.targets import TARGETS


def main() -> None:
    name, *rest = sys.argv[1:] or [""]
    if name not in TARGETS:
        sys.exit(f"expected one of {', '.join(TARGETS)}; got {name!r}")
    torch.set_num_threads(1)
    corpus = Path(__file__).parents[2] / "build" / "fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = Path(__file__).parent / "corpus" / name
    flags = [f"-artifact_prefix={corpus.parent}/{name}-", "-max_len=256", "-len_control=0"]
    files = [f for f in rest if not f.isdigit()]
    if files:
        flags += files
    else:
        seconds = rest[0] if rest else "60"
        flags += [f"-max_total_time={seconds}", "-timeout=30", "-rss_limit_mb=4096"]
        flags += [str(corpus), *([str(seeds)] if seeds.is_dir() else [])]
    target = TARGETS[name]
    target(b"")  # torch imports a lot on first use: not within an input's 30 s
    atheris.Setup([sys.argv[0], *flags], target)
    atheris.Fuzz()


main()
