"""Bytes as decisions: the same for atheris, hypothesis and files of the corpus."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 5e-324, 1e308, -1e308, 1e30, math.inf, -math.inf]
INTS = [0, 1, -1, 2, 3, 7, 100, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 2**63, 2**64, -(2**80)]
DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int8),
    *(torch.bool, torch.complex64, torch.uint8),
]


class Source:
    """Reads decisions off a string of bytes; zeros once it has ended."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def take(self, count: int) -> bytes:
        part = self.data[self.at : self.at + count]
        self.at += count
        return part

    def rest(self) -> bytes:
        return self.take(len(self.data))

    def more(self) -> bool:
        return self.at < len(self.data)

    def pick(self, choices: Sequence[T]) -> T:
        return choices[(self.byte() * 256 + self.byte()) % len(choices)]

    def whole(self) -> int:
        return self.pick(INTS) if self.byte() % 4 else int.from_bytes(self.take(8), "big")

    def real(self) -> float:
        kind = self.byte() % 8
        if kind == 0:
            return math.nan
        if kind < 4:
            return self.pick(FLOATS)
        number: float = struct.unpack(">d", self.take(8).ljust(8, b"\0"))[0]
        return number if kind < 6 else self.byte() / 128

    def text(self) -> str:
        return self.take(self.byte() % 24).decode("utf-8", "replace")

    def tensor(self) -> Tensor:
        """Small, of any kind."""
        shape = [self.byte() % 5 for _ in range(self.byte() % 4)]
        values = [self.real() for _ in range(min(4, math.prod(shape)))] or [0.0]
        out = torch.tensor(values, dtype=torch.float64)
        out = out.repeat(-(-math.prod(shape) // len(values)))[: math.prod(shape)].reshape(shape)
        dtype = self.pick(DTYPES)
        return out.nan_to_num(0, 1, -1).clamp(-9, 9).to(dtype) if _integer(dtype) else out.to(dtype)

    def anything(self, depth: int = 2) -> Any:
        """A value of some plain type."""
        kind = self.byte() % (11 if depth else 8)
        if kind < 8:
            plain: list[Any] = [lambda: None, self.whole, self.real, self.text, self.tensor]
            return [*plain, lambda: True, lambda: b"", lambda: "default"][kind]()
        size = self.byte() % 3
        if kind == 8:
            return {self.text(): self.anything(depth - 1) for _ in range(size)}
        items = [self.anything(depth - 1) for _ in range(size)]
        return items if kind == 9 else tuple(items)


def _integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def other(source: Source, value: Tensor) -> Any:
    """The tensor changed a little, so that most checks let it pass, or something else for it."""
    kind = source.byte() % 8
    if value.layout is not torch.strided or value.is_meta or value.is_complex():
        return source.anything()  # changed before
    changed = value.detach().clone(memory_format=torch.contiguous_format)
    if kind < 4 and value.numel():
        flat = changed.view(-1)
        for _ in range(1 + source.byte() % 2):
            at = source.byte() % value.numel()
            if changed.is_floating_point():
                flat[at] = torch.tensor(source.real(), dtype=torch.float64)
            elif changed.dtype is torch.bool:
                flat[at] = ~flat[at]
            else:
                limits = torch.iinfo(changed.dtype)
                flat[at] = max(limits.min, min(limits.max, source.whole()))
        return changed
    if kind == 4:
        return changed.unsqueeze(0) if source.byte() % 2 else changed.view(-1)[:0]
    if kind == 5:
        return changed.to(source.pick(DTYPES))
    if kind == 6:
        twice = changed.expand(2, *value.shape)
        return source.pick([changed.to("meta"), changed.to_sparse(), twice])
    return source.anything()
