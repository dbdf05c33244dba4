"""README's quick start runs as it stands and trains."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_quick_start(tmp_path):
    text = README.read_text()
    code = re.search(r"## Quick start\n\n```python\n(.*?)```", text, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line]) <= 15
    script = tmp_path / "quick_start.py"
    script.write_text("import torch\ntorch.manual_seed(0)\n" + code)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "14 LoRA pairs" in done.stdout
    loss = float(re.search(r" (\d+\.\d+) \{", done.stdout).group(1))
    assert loss < 5.2  # log 256 = 5.55 at the start


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target


def test_commands_of_the_table_exist():
    for command in re.findall(r"`(?:python )?((?:bench|tests)/[^ `]+)", README.read_text()):
        assert (README.parent / command).exists(), command
