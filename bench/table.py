"""The speed figures of one folder of records as one table.

    python bench/table.py [bench/results]

Reads step.json, peers.json, scaling.json and roofline.json as far as they are there; the scripts in
bench/python write them. A figure above its limit is marked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = tuple[str, float | None, float | None, float | None]  # what, median, p95, at most


def ratio(name: str, found: dict[str, float] | None, target: float | None, kind: str) -> Row | None:
    """A row of a ratio; `kind` is the figure that counts."""
    return None if found is None else (name, found[kind], found["p95"], target)


def peers(result: dict[str, Any]) -> list[Row | None]:
    """The optimizer's step beside others, and the training steps."""
    step, training = result.get("step", {}), result.get("training", {})
    rows: list[Row | None] = []
    for job, peer, target, kind in (
        ("large", "adamw_fused", 2.0, "median"),
        ("large", "riemannian_adamw", 0.4, "median"),
        ("large", "lora_rite", 0.12, "median"),
        ("large", "soap", 0.05, "mean"),
        ("large", "heavyball_soap", None, "mean"),
        ("small", "adamw_foreach", 1.0, "median"),
        ("small", "adamw_fused", None, "median"),
        ("small", "lora_rite", None, "median"),
    ):
        own = step.get(job, {}).get("ours_over", {}).get(peer)
        for mode, words in (
            ("ctr", "step()"),
            ("ctr_thirds", "  factor_every 3"),
            ("ctr_plain", "  nothing observed"),
        ):
            name = f"{words} / {peer}, {job}"
            aim = target if mode == "ctr" else None
            found = None if own is None else own.get(mode)
            rows.append(ratio(name, found, aim, kind))
    for job, found in training.items():
        over = found["over_adamw"]
        rows.append(ratio(f"training step, fused / adamw, {job}", over["fused"], 0.95, "median"))
        rows.append(ratio(f"training step, attached / adamw, {job}", over["ctr"], 1.03, "median"))
        half = found["compacted_over_fused"]
        rows.append(ratio(f"training step, compacted / before, {job}", half, 0.97, "median"))
        for peer in ("adalora", "riemannian_adamw", "singd"):
            other = found["fused_over"].get(peer)
            rows.append(ratio(f"training step, fused / {peer}, {job}", other, None, "median"))
    for job, found in step.items():
        for name, share in found["state_over_adamw"].items():
            if name in ("ctr", "ctr_bfloat16", "lora_rite", "soap"):
                aim = 1.0 if name == "ctr_bfloat16" and job == "large" else None
                rows.append((f"state bytes, {name} / adamw, {job}", share, None, aim))
    return rows


def memory(result: dict[str, Any]) -> list[Row | None]:
    """Peak memory of the training step."""
    peak = result.get("training_step", {}).get("peak_to_adamw", {})
    return [(f"peak memory, {name} / adamw, gpt", peak[name], None, 1.0) for name in peak]


def scaling(result: dict[str, Any]) -> list[Row | None]:
    """Fitted exponents."""
    rows: list[Row | None] = []
    for name, found in result["sweeps"].items():
        aim = {"d": 1.10, "pairs": 1.05}.get(name)
        rows += [
            (f"exponent of {what} in {name}", found[f"{what}_exponent"]["fit"], None, aim)
            for what in ("time", "memory")
        ]
    return rows


def roofline(result: dict[str, Any]) -> list[Row | None]:
    """Spread of the step, and its share of the machine's limits."""
    rows: list[Row | None] = []
    for name, found in result["steps"].items():
        if name != "adamw":
            spread = found["p95_over_median"]
            rows.append((f"step(), {name}: p95 / median", spread, None, 1.5))
        rows.append((f"roofline reached, {name}", found["bound"] / found["median"], None, None))
    return rows


READERS = {"peers": peers, "step": memory, "scaling": scaling, "roofline": roofline}


def table(folder: Path) -> list[str]:
    """The lines, of every record that is there."""
    lines = [f"{'measure':56} {'figure':>8} {'p95':>8} {'at most':>8}"]
    for name, read in READERS.items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        for row in read(result):
            if row is not None:
                what, *numbers = row
                text = " ".join(f"{'' if n is None else format(n, '.3f'):>8}" for n in numbers)
                above = row[3] is not None and row[1] is not None and row[1] > row[3]
                lines.append(f"{what:56} {text}{'  above' if above else ''}")
        lines += [f"not measured: {k} ({why})" for k, why in result.get("missing", {}).items()]
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("bench/results"))
    print("\n".join(table(parser.parse_args().folder)))


if __name__ == "__main__":
    main()
