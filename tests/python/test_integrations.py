"""Real runs under transformers' Trainer, TRL's SFTTrainer and Accelerate, on tiny models."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pyctrlora import CTROptimizer
from pyctrlora.writers import CsvWriter, TensorBoardWriter

if TYPE_CHECKING:
    from pathlib import Path

# The libraries' own notices; a warning of ours stays an error.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

TOKENS = 64


def tiny_model(seed: int = 0, dropout: float = 0.0) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=TOKENS, max_position_embeddings=32,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    # The head of a random model must learn too: it goes to the fallback group.
    lora = LoraConfig(
        r=4, target_modules="all-linear", lora_dropout=dropout, modules_to_save=["lm_head"]
    )
    return get_peft_model(LlamaForCausalLM(config), lora)


def rows(count: int = 96) -> list[dict[str, Any]]:
    """Counting modulo the vocabulary: easy to learn."""
    starts = torch.arange(count) * 7
    ids = (starts[:, None] + torch.arange(16)) % (TOKENS - 3) + 3
    return [{"input_ids": x, "labels": x} for x in ids]


def trainer(folder: Path, model: Any, callbacks: Any = None, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from pyctrlora.integrations.transformers import CTROptimizerFactory

    standard = {"max_steps": 12, "report_to": "none", "save_strategy": "no", "logging_steps": 2}
    arguments = {**standard, **arguments}
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=8,
        lr_scheduler_type="linear", disable_tqdm=True, seed=3, **arguments,
    )  # fmt: skip
    factory = (CTROptimizerFactory, {"lr": 0.1, "fallback_lr": 0.02})
    return Trainer(
        model, args, train_dataset=rows(), optimizer_cls_and_kwargs=factory, callbacks=callbacks
    )


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"bf16": True}],
    ids=["plain", "accumulation", "checkpointing", "bf16"],
)
def test_trainer_trains_with_the_factory(tmp_path, arguments):
    model = tiny_model()
    run = trainer(tmp_path, model, **arguments)
    run.train()
    opt = run.optimizer.optimizer
    assert isinstance(opt, CTROptimizer)
    assert len(opt.ranks()) == 14
    assert "not observed" not in opt.describe()
    assert opt.metrics()["steps"] == 12
    assert [g["lr"] for g in opt.param_groups] == [0.0, 0.0]  # the Trainer's schedule
    found = losses(run)
    assert found[-1] < 0.8 * found[0]


def test_trainer_resumes_bit_for_bit_and_logs(tmp_path):
    from pyctrlora.integrations.transformers import CTRCallback

    results = []
    for folder, stops in (("whole", [12]), ("parts", [5, 12])):
        for stop in stops:
            model = tiny_model(dropout=0.1)  # its random numbers resume too
            run = trainer(
                tmp_path / folder, model, save_strategy="steps", save_steps=5, logging_steps=1
            )
            CTRCallback(CsvWriter(tmp_path / folder / "metrics.csv")).add_to(run)
            if stop < 12:
                run.add_callback(stop_after(stop))
            run.train(resume_from_checkpoint=stops.index(stop) > 0)
        results.append((losses(run), {n: p for n, p in model.named_parameters() if "lora" in n}))
    assert results[0][0] == results[1][0]
    for name, tensor in results[0][1].items():
        assert torch.equal(tensor, results[1][1][name]), name
    ranks = json.loads((tmp_path / "parts" / "checkpoint-10" / "ctrlora_ranks.json").read_text())
    assert ranks == run.optimizer.optimizer.ranks()
    assert set(ranks.values()) == {4}
    text = (tmp_path / "parts" / "metrics.csv").read_text()
    table = list(csv.DictReader(text.splitlines()))
    assert [int(row["step"]) for row in table] == list(range(1, 13))
    assert all(float(row["steps"]) == float(row["step"]) for row in table)
    assert [float(row["loss"]) for row in table] == results[0][0]
    entry = run.state.log_history[3]
    assert entry["ctrlora/steps"] == entry["step"]


def stop_after(step: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= step

    return Stop()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = {}
    for file in folder.rglob("events*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            out[tag] = [(e.step, e.value) for e in events.Scalars(tag)]
    return out


def test_the_trainers_own_tensorboard_sees_the_numbers(tmp_path, monkeypatch):
    from pyctrlora.integrations.transformers import CTRCallback

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = trainer(tmp_path, tiny_model(), max_steps=4, report_to="tensorboard")
    CTRCallback().add_to(run)
    run.train()
    assert [step for step, _ in scalars(tmp_path / "board")["train/ctrlora/kl_shrink"]] == [2, 4]


def test_our_tensorboard_writer(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write({"kl_shrink": 0.5}, 3)
    writer.close()
    assert scalars(tmp_path) == {"ctrlora/kl_shrink": [(3, 0.5)]}


def test_the_csv_file_goes_on_where_a_resumed_run_does(tmp_path):
    path = tmp_path / "deep" / "metrics.csv"
    first = CsvWriter(path)
    for step in (1, 2, 3):
        first.write({"loss": step / 2}, step)
    second = CsvWriter(path)  # resumed from step 1
    second.write({"loss": 9.0}, 2)
    second.write({"loss": 8.0, "kl": 0.1}, 3)
    second.close()
    assert path.read_text() == "step,loss,kl\n1,0.5,\n2,9.0,\n3,8.0,0.1\n"
    assert [file.name for file in path.parent.iterdir()] == ["metrics.csv"]


def test_sft_trainer(tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from pyctrlora.integrations.transformers import CTRCallback, CTROptimizerFactory

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, TOKENS)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    texts = [" ".join(f"w{int(i)}" for i in row["input_ids"]) for row in rows()]
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=12, logging_steps=2,
        per_device_train_batch_size=8, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=True, packing=True, max_length=16,
    )  # fmt: skip
    run = SFTTrainer(
        tiny_model(), args, train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=fast,
        optimizer_cls_and_kwargs=(CTROptimizerFactory, {"lr": 0.1, "fallback_lr": 0.02}),
    )  # fmt: skip
    CTRCallback().add_to(run)
    run.train()
    found = losses(run)
    assert found[-1] < 0.8 * found[0]
    assert run.optimizer.optimizer.metrics()["steps"] == 12
    assert "ctrlora/kl_shrink" in run.state.log_history[0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(tmp_path, accumulate):
    from accelerate import Accelerator

    from pyctrlora.integrations.accelerate import log, prepare

    torch.manual_seed(0)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, log_with="tensorboard",
        project_dir=tmp_path,
    )  # fmt: skip
    accelerator.init_trackers("run")
    data = torch.stack([row["input_ids"] for row in rows()])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=8)
    model = tiny_model()
    opt = CTROptimizer.from_model(model, fallback_lr=0.02)
    model, wrapped, loader = prepare(accelerator, model, opt, loader)
    found = []
    for (ids,) in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            wrapped.step()
            wrapped.zero_grad()
        found.append(loss.item())
        log(accelerator, wrapped, len(found), loss=loss.item())
    steps = 12 // accumulate
    assert opt.metrics()["steps"] == steps
    assert found[-1] < found[0]
    accelerator.save_state(str(tmp_path / "state"))
    before = {n: t.clone() for n, t in opt.state_dict()["ctrlora"]["tensors"].items()}
    loss = model(input_ids=data[:8], labels=data[:8]).loss
    accelerator.backward(loss)
    opt.step()
    accelerator.load_state(str(tmp_path / "state"))
    after = opt.state_dict()["ctrlora"]["tensors"]
    assert all(torch.equal(after[n], t) and after[n].dtype is t.dtype for n, t in before.items())
    accelerator.end_training()
    seen = scalars(tmp_path)
    assert len(seen["ctrlora/steps"]) == 12
    assert seen["ctrlora/steps"][-1][1] == steps


def test_nothing_is_imported_unasked():
    code = (
        "import sys, pyctrlora, pyctrlora.writers, pyctrlora.checkpoint, pyctrlora.integrations\n"
        "names = {'transformers', 'accelerate', 'lightning', 'tensorboard', 'trl', 'peft'}\n"
        "assert not names & {name.split('.')[0] for name in sys.modules}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=sys.prefix
    )
    assert done.returncode == 0, done.stderr
