"""The demo through its command line, with tiny settings: table, picture, adapter, JSON, errors."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import pyctrlora
from pyctrlora.demo import data
from pyctrlora.demo.__main__ import main
from pyctrlora.demo.job import Job, gpt_job
from pyctrlora.demo.model import GPTConfig
from pyctrlora.demo.pretrain import Pretraining, load_or_pretrain
from pyctrlora.demo.train import CTR, Run, Settings, compare, fine_tune, sweep

if TYPE_CHECKING:
    from pathlib import Path

PNG = b"\x89PNG\r\n\x1a\n"
TINY = ["--threads", "1", "--pretrain-steps", "2", "--steps", "8", "--batch", "2", "--rank", "2"]
SMALL = Pretraining(GPTConfig(vocabulary=300, width=16, layers=1, heads=2, context=16), steps=3)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for base models, shared: the first test pretrains, the others read."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small_job(cache: Path) -> Job:
    """A GPT of 16 wide, one block, on the demo's prose."""
    return gpt_job(load_or_pretrain(SMALL, cache), rank=2)


def test_the_command_compares_both_and_leaves_its_results(cache: Path, tmp_path: Path) -> None:
    arguments = [*TINY, "--quick", "--cache", str(cache), "--out", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-m", "pyctrlora.demo", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    _check_table(run.stdout, quarters=(2, 4, 6, 8))
    assert "AdamW ran once, with lr 0.011" in run.stdout
    _check_results(tmp_path, tmp_path / "adapter.safetensors", runs=2)


def test_a_budget_leaves_its_pictures_and_its_report(cache: Path, tmp_path: Path) -> None:
    arguments = [*TINY, "--quick", "--budget", "0.5", "--cache", str(cache), "--out", str(tmp_path)]
    main(arguments)
    for name in ("loss", "training", "ranks", "budget"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["runs"][-1]["optimizer"] == "CTROptimizer"


def test_a_start_by_cg_init_leaves_its_spectra(cache: Path, tmp_path: Path) -> None:
    arguments = [*TINY, "--quick", "--cg-init", "4", "--cache", str(cache), "--out", str(tmp_path)]
    assert main(arguments) == 0
    for name in ("loss", "training", "spectra"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    assert not (tmp_path / "ranks.png").exists()
    adamw, ctr = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert ctr["spectra"].keys() == ctr["noise_floors"].keys()
    assert ctr["spectra"]
    assert ctr["seconds"][0] == ctr["start_seconds"] > 0
    assert not adamw["spectra"]


def test_sweep_on_own_text_reuses_the_cached_model(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 400)
    arguments = [*TINY, "--data", str(text), "--cache", str(cache), "--out", str(tmp_path / "out")]
    for _ in range(2):
        assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "read from the cache" in output
    assert "fine-tuning on own.txt" in output
    assert re.search(
        r"AdamW's final loss by learning rate: (\S+: \d+\.\d+[,;] ){4,}the table has the best",
        output,
    )
    _check_table(output, quarters=(2, 4, 6, 8))
    _check_results(tmp_path / "out", tmp_path / "out" / "adapter.safetensors", runs=5)


# PEFT 0.21 reads the alias.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_transformers_folder_is_trained_through_peft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "gpt2", tmp_path / "out"
    _save_gpt2(model)
    arguments = [*TINY, "--quick", "--model", str(model), "--out", str(out)]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "GPT2LMHeadModel" in output
    _check_table(output, quarters=(2, 4, 6, 8))
    _check_results(out, out / "adapter" / "adapter_model.safetensors", runs=2)
    assert (out / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], r"expected a transformers folder with a config.json; got nowhere"),
        (["--data", "nowhere.txt"], r"nowhere.txt"),
        (["--data", "SHORT"], r"expected a text of at least \d+ tokens; got \d+. Remedy"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str],
    message: str,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    arguments = [a.replace("SHORT", str(tmp_path / "short.txt")) for a in arguments]
    assert main([*TINY, "--cache", str(cache), "--out", str(tmp_path), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "option", ["--rank=0", "--steps=1", "--lr=0", "--lr=nan", "--threads=0", "--cg-init=3"]
)
def test_numbers_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([option])


def test_damaged_cache_is_replaced(tmp_path: Path) -> None:
    lines: list[str] = []
    first = load_or_pretrain(SMALL, tmp_path, lines.append)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    second = load_or_pretrain(SMALL, tmp_path, lines.append)
    third = load_or_pretrain(SMALL, tmp_path, lines.append)
    assert [base.cached for base in (first, second, third)] == [False, False, True]
    assert len(lines) == 1
    assert "cannot be read" in lines[0]
    assert list(tmp_path.iterdir()) == [file]
    assert third.tokenizer.merges == first.tokenizer.merges
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, third.model.state_dict()[name])


def test_other_settings_have_another_cache_entry(cache: Path) -> None:
    load_or_pretrain(SMALL, cache)
    other = dataclasses.replace(SMALL, steps=4)
    assert not load_or_pretrain(other, cache).cached
    assert load_or_pretrain(other, cache).cached


def test_both_optimizers_start_alike_and_runs_repeat(small_job: Job) -> None:
    settings = Settings(steps=6, batch=2, evaluations=3, quick=True)
    lines: list[str] = []
    first, second = (compare(small_job, settings, lines.append) for _ in range(2))
    assert len(lines) == 4
    assert first.adamw.losses[0] == first.ctr.losses[0]
    assert first.adamw.train_losses[0] == first.ctr.train_losses[0]  # the same first batch
    assert first.adamw.losses[1:] != first.ctr.losses[1:]
    assert first.adamw.losses == second.adamw.losses
    assert first.ctr.losses == second.ctr.losses
    assert first.ctr.steps == [0, 2, 4, 6]


def test_adapters_of_every_linear_are_trained_and_nothing_else(small_job: Job) -> None:
    start = small_job.make(0).state_dict()
    run, model = fine_tune(small_job, Settings(steps=4, batch=2, evaluations=1), CTR, 0.1)
    layers = [m for m in model.modules() if isinstance(m, pyctrlora.LoRALinear)]
    assert len(layers) == 6
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, start[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(changed) == 12
    assert run.state_bytes > 0


def test_sweep_goes_on_until_the_best_is_inside(small_job: Job) -> None:
    # 1e-6 and 2e-6 do nothing in four steps: the better one is at the edge, more must follow.
    settings = Settings(steps=4, batch=2, evaluations=1, adamw_lrs=(1e-6, 2e-6))
    rates = [run.lr for run in sweep(small_job, settings, [].append)]
    assert len(rates) == 10
    assert rates == pytest.approx([1e-6 * 2**i for i in range(10)])
    settings = dataclasses.replace(settings, adamw_lrs=(0.01, 0.03, 300.0, 900.0))
    runs = sweep(small_job, settings, [].append)
    best = min(runs, key=lambda run: run.final_loss)
    assert runs[0].lr < best.lr < runs[-1].lr


def test_reaches_interpolates_and_tells_never() -> None:
    run = Run("AdamW", 0.01, steps=[0, 10, 20], losses=[4.0, 3.0, 2.0], seconds=[0.0, 1.0, 3.0])
    assert run.reaches(2.5) == pytest.approx((15.0, 2.0))
    assert run.reaches(4.5) == (0.0, 0.0)
    assert run.reaches(1.9) is None
    run.losses[1] = math.inf
    assert run.reaches(2.5) == (20.0, 3.0)


def test_validation_is_held_out_and_prose_has_no_repeated_paragraph() -> None:
    train, held_out = data.split(torch.arange(5000), context=9)
    assert len(held_out) == 56  # 8 of 64 blocks, 7 windows each
    assert not set(train.tolist()) & set(held_out.flatten().tolist())
    paragraphs = data.prose().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs)) > 500


def test_code_has_neither_docstrings_nor_comments() -> None:
    code = data.source_code(300_000)
    assert "\n#" not in code
    assert '"""' not in code
    assert code.count("def ") > 500


def _check_table(output: str, quarters: tuple[int, ...]) -> None:
    assert re.search(r"AdamW \(lr \S+\) +CTROptimizer \(lr 0.1\)", output)
    for step, percent in zip(quarters, (25, 50, 75, 100), strict=True):
        assert re.search(rf"after {step} steps \({percent} %\) +\d+\.\d+ +\d+\.\d+", output)
    assert re.search(r"steps to AdamW's \d\.\d+ +8 +(\d+ \(\d\.\d\dx\)|not reached)", output)
    assert re.search(r"seconds to it +\d+\.\d+ +(\d+\.\d+|not reached)", output)
    assert re.search(r"seconds per step +\d\.\d+ +\d\.\d+", output)
    assert re.search(r"optimizer state +\d+\.\d+ MiB +\d+\.\d+ MiB", output)


def _check_results(folder: Path, adapter: Path, runs: int) -> None:
    assert (folder / "loss.png").read_bytes().startswith(PNG)
    tensors = load_file(adapter)
    sides: dict[str, list[Any]] = {"lora_a": [], "lora_b": []}
    for name, tensor in tensors.items():
        sides["lora_a" if "lora_a" in name.lower() else "lora_b"].append(tensor)
    assert len(sides["lora_a"]) == len(sides["lora_b"]) > 0
    assert all(t.shape[0] == 2 for t in sides["lora_a"])
    assert all(t.any() for t in sides["lora_b"])  # zero before training
    content = json.loads((folder / "run.json").read_text())
    assert len(content["runs"]) >= runs
    assert content["runs"][-1]["optimizer"] == "CTROptimizer"
    assert content["versions"]["torch"] == version("torch")
    assert content["machine"]["torch"] == torch.__version__  # with "+cu130" or the like
    assert content["settings"]["steps"] == 8


def _save_gpt2(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([data.prose()[:20_000]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
