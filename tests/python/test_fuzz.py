"""The fuzz targets on some hundred inputs: quick, the same each time. At length: ./dev fuzz."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"
PHASES = [Phase.explicit, Phase.generate]  # an input that fails is short enough as it is


@pytest.mark.parametrize("target", TARGETS)
@settings(deadline=None, derandomize=True, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=8, max_size=64))
def test_random_inputs(target: str, data: bytes) -> None:
    TARGETS[target](data)


@pytest.mark.parametrize(
    "file", sorted(CORPUS.rglob("*-*")), ids=lambda f: f"{f.parent.name}-{f.name[:12]}"
)
def test_inputs_of_the_corpus(file: Path) -> None:
    TARGETS[file.parent.name](file.read_bytes())
