"""Command line of the demo."""

from __future__ import annotations

import argparse
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

try:
    import matplotlib as mpl  # noqa: F401
    import safetensors  # noqa: F401
    import tqdm  # noqa: F401
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"[pyctrlora.demo] expected matplotlib, safetensors and tqdm; {missing.name} is missing. "
        "Remedy: pip install 'pyctrlora[demo]'."
    ) from missing

from pyctrlora import plot
from pyctrlora.demo import report
from pyctrlora.demo.job import Job, gpt_job, transformers_job
from pyctrlora.demo.pretrain import Pretraining, default_cache, load_or_pretrain
from pyctrlora.demo.train import Run, Settings, compare

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Args:
        arguments: of the command line; None takes the process's.

    Returns:
        The exit status: 0, or 2 for bad input.
    """
    began = time.perf_counter()
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        job, origin = _make_job(options)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    settings = Settings(
        steps=options.steps,
        batch=options.batch,
        lr=options.lr,
        seed=options.seed,
        quick=options.quick,
        budget=options.budget,
        calibration=options.cg_init,
    )
    print(f"fine-tuning on {job.text}: LoRA rank {options.rank} on all linear layers")
    result = compare(job, settings, say=_say)
    print(f"\n{report.table(result)}\n")
    adapter = job.save(result.model, options.out)
    report.plot(options.out / "loss.png", job, result)
    _plot_report(options.out, result.ctr)
    seconds = time.perf_counter() - began
    extra = {"rank": options.rank, "seconds": seconds, "versions": _versions(), **origin}
    report.write_json(options.out / "run.json", report.as_json(job, result, extra))
    print(f"{options.out / 'loss.png'}: the curves\n{adapter}: CTROptimizer's adapter")
    print(f"{options.out / 'run.json'}: every figure\n{seconds:.0f} s in all")
    return 0


def _make_job(options: argparse.Namespace) -> tuple[Job, dict[str, Any]]:
    if options.model is not None:
        job = transformers_job(options.model, options.rank, options.data)
        print(f"base model: {job.model}")
        return job, {}
    settings = Pretraining(steps=options.pretrain_steps)
    base = load_or_pretrain(settings, options.cache, say=_say)
    job = gpt_job(base, options.rank, options.data)
    how = "read from the cache" if base.cached else f"took {base.seconds:.0f} s"
    print(
        f"base model: {job.model} ({how}); validation loss on code {base.code_loss:.2f} nats "
        f"per token, a uniform guess has {job.uniform_loss:.2f}"
    )
    return job, {
        "pretraining_seconds": base.seconds,
        "code_loss": base.code_loss,
        "cached": base.cached,
    }


def _plot_report(folder: Path, run: Run) -> None:
    if run.spectra:
        plot.spectra(run.spectra, folder / "spectra.png", run.noise_floors)
        print(f"{folder / 'spectra.png'}: what cg_init found, in {run.start_seconds:.1f} s")
    content = run.report
    assert content is not None  # CTROptimizer's run has one
    plot.training(content, folder / "training.png")
    print(f"{folder / 'training.png'}: loss, predicted KL, change of outputs by step")
    if content["budget"] is not None:
        plot.ranks(content, folder / "ranks.png")
        plot.budget(content, folder / "budget.png")
        ranks = content["ranks"].values()
        print(
            f"{folder / 'ranks.png'}, budget.png: {content['parameters']} of "
            f"{content['budget']} parameters in use, ranks {min(ranks)} to {max(ranks)}, "
            f"{len(content['events'])} changes of layers"
        )


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def _versions() -> dict[str, str]:
    names = ("pyctrlora", "torch", "numpy", "safetensors", "matplotlib", "peft", "transformers")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pyctrlora.demo",
        description="Fine-tunes a language model by LoRA with AdamW and with CTROptimizer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE.txt", help="train on this text instead of Python's")
    add("--model", type=Path, metavar="DIR", help="a transformers causal LM with its tokenizer")
    add("--rank", type=_at_least(1), default=8, help="of the adapters")
    add("--steps", type=_at_least(4), default=120, help="of every run")
    add("--batch", type=_at_least(1), default=8, help="sequences a step")
    add("--lr", type=_positive, default=0.1, help="CTROptimizer's")
    add("--budget", type=_positive, metavar="SHARE", help="of the adapters' parameters, up to 1")
    add("--cg-init", type=_at_least(4), default=0, metavar="BATCHES", help="start from cg_init")
    add("--seed", type=int, default=0, help="of adapters and batches")
    add("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="for the results")
    add("--quick", action="store_true", help="one learning rate for AdamW, not a sweep")
    add("--threads", type=_at_least(1), default=2, help="of torch")
    add("--cache", type=Path, default=default_cache(), metavar="DIR", help="for the base model")
    add("--pretrain-steps", type=_at_least(1), default=Pretraining.steps, help="of the base model")
    return parser


def _at_least(least: int) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}; got {value}")
        return value

    return parse


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0; got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
