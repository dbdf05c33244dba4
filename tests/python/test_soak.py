"""The soak bench, short: all that it checks but memory, which takes thousands of steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "bench" / "python" / "soak.py"


def test_a_short_soak_holds(tmp_path):
    out = tmp_path / "soak.json"
    command = [sys.executable, str(SOAK), "--steps", "400", "--reload", "130", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert out.exists(), done.stderr
    result = json.loads(out.read_text())
    assert result["figures"]["reloads"] == 3
    assert {name: held for name, held in result["holds"].items() if name != "memory_flat"} == {
        "bases_orthonormal": True,
        "budget_exact": True,
        "loss_stays_down": True,
        "losses_equal_on_a_repeat": True,
    }
