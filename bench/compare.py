"""Two records of one bench side by side.

    python bench/compare.py old.json new.json [--above 0.05]

Prints every number that both hold, with new / old, and marks those that moved by more than `above`.
Absolute times of two runs compare machines as much as code: look at ratios first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    Numbers = dict[str, float]


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested dicts and lists, with its path."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return
    if isinstance(value, int | float):
        yield path, float(value)
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield from numbers(item, f"{path}.{key}" if path else str(key))


def load(path: Path) -> tuple[dict[str, Any], Numbers]:
    """The machine it was measured on, and the numbers without it."""
    record = json.loads(path.read_text())
    machine = record.pop("machine", {})
    return machine, dict(numbers(record))


def table(old: Numbers, new: Numbers, above: float) -> list[str]:
    """A line per common number, those that moved marked by an asterisk."""
    lines = []
    width = max((len(name) for name in old if name in new), default=0)
    for name, before in old.items():
        if name not in new:
            continue
        after = new[name]
        ratio = after / before if before else float("nan")
        moved = " *" if before != after and not abs(ratio - 1) <= above else ""
        lines.append(f"{name:{width}}  {before:12.6g} {after:12.6g} {ratio:8.3f}{moved}")
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--above", type=float, default=0.05, help="mark larger relative changes")
    options = parser.parse_args()
    (machine, old), (other, new) = load(options.old), load(options.new)
    for key in machine:
        if machine[key] != other.get(key):
            print(f"{key}: {machine[key]} -> {other.get(key)}")
    for name in sorted(old.keys() ^ new.keys()):
        print(f"only in {'old' if name in old else 'new'}: {name}")
    print("\n".join(table(old, new, options.above)))


if __name__ == "__main__":
    main()
