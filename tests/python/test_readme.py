"""README's quick start runs as it stands and trains."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def guide() -> dict[str, str]:
    """Heading to code; the first block belongs to all."""
    text = README.read_text()
    section = text[text.index("## Guide") : text.index("## Works with")]
    blocks = re.split(r"^### (.*)$", section, flags=re.MULTILINE)
    code = [re.search(r"```\w+\n(.*?)```", part, re.DOTALL).group(1) for part in blocks[::2]]
    return {"": code[0], **dict(zip(blocks[1::2], code[1:], strict=True))}


@pytest.mark.parametrize(("task", "code"), [item for item in guide().items() if item[0]])
def test_guide(tmp_path, task, code):
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "CMAKE_GENERATOR": "Ninja"}
    quiet["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{quiet['PATH']}"
    script = tmp_path / "train.py"
    script.write_text("import torch\ntorch.manual_seed(0)\n" + guide()[""] + code)
    command = [sys.executable, str(script)]
    if task == "A C++ program":
        command = ["bash", "-euc", code]
        for name in ("tests", "LICENSE"):
            (tmp_path / name).symlink_to(README.parent / name)
    elif task == "Several processes":
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command = [sys.executable, *launcher, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    if task == "With transformers' Trainer, or TRL's":
        assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 5
        assert (tmp_path / "run" / "checkpoint-20" / "ctrlora_ranks.json").exists()
    elif task.startswith("Start values"):
        assert (tmp_path / "ranks.png").stat().st_size > 5000
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    elif task.startswith("Choose"):
        losses, without, half = re.fullmatch(r"\{(.*)\} (\S+) (\S+)\n", done.stdout).groups()
        swept = [float(item.split(": ")[1]) for item in losses.split(", ")]
        assert len(swept) == 3
        assert max(*swept, float(without), float(half)) < 5.6  # log 256 = 5.55 at the start
    elif task == "Read the pictures":
        for name in ("spectra", "training", "ranks", "budget"):
            assert (tmp_path / f"{name}.png").stat().st_size > 5000
    elif task.startswith("A loop of your own"):
        assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 20
    elif task == "A C++ program":
        losses = [float(x.split()[2]) for x in done.stdout.splitlines()[-20:]]
        assert losses[-1] < losses[0]


def test_every_line_of_works_with_names_a_test_that_exists():
    text = README.read_text()
    table = text[text.index("## Works with") : text.index("## How it works")]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    for row in rows:
        name, file = re.search(r"\[`(\w+)`\]\(([^)]+)\) \|$", row).groups()
        assert re.search(rf"def {name}\(", (README.parent / file).read_text()), row
    assert len(rows) > 15


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target


def test_commands_of_the_table_exist():
    for command in re.findall(r"`(?:python )?((?:bench|tests)/[^ `]+)", README.read_text()):
        assert (README.parent / command).exists(), command
