"""Text that every Python ships, a byte-pair tokenizer, and batches of tokens."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# A word with the blank before it, a digit, punctuation, a line break with its indentation, blanks.
PIECE = re.compile(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\n *| +(?= )|\s")

# pydoc_data is the fine-tuning text; the others are tests, tables or third-party code.
SKIPPED = {"pydoc_data", "test", "tests", "idlelib", "lib2to3", "encodings", "site-packages"}
SKIPPED |= {"dist-packages", "turtledemo", "ensurepip", "__pycache__"}
PROSE_IN_CODE = re.compile(r"[rR]?(\"{3}|'{3}).*?\1|(?m:^|  )[ \t]*#[^\n]*", re.DOTALL)

Pair = tuple[int, int]


class BytePairTokenizer:
    """Byte-level byte-pair encoding: ids 0..255 are bytes, id 256 + i is the i-th merge.

    Args:
        merges: pairs of ids in the order in which they were learnt.

    Example:
        >>> tokenizer = BytePairTokenizer.train("the cat, the hat, the bat", vocabulary=260)
        >>> tokenizer.decode(tokenizer.encode("the hat \u00e9"))
        'the hat \u00e9'
    """

    def __init__(self, merges: Iterable[Pair]) -> None:
        self.merges: list[Pair] = [(int(a), int(b)) for a, b in merges]
        self._ids = {pair: 256 + i for i, pair in enumerate(self.merges)}
        self._bytes = [bytes([i]) for i in range(256)]
        for a, b in self.merges:
            self._bytes.append(self._bytes[a] + self._bytes[b])
        self._pieces: dict[str, list[int]] = {}

    @classmethod
    def train(cls, text: str, vocabulary: int) -> BytePairTokenizer:
        """Learns `vocabulary` - 256 merges from `text`, fewer if no pair occurs twice.

        Only the pairs beside a merge are counted anew, so 1800 merges take about a second.
        """
        pieces = Counter(PIECE.findall(text)).most_common(10_000)  # rarer pieces decide no merge
        words = [list(piece.encode()) for piece, _ in pieces]
        weights = [count for _, count in pieces]
        counts: Counter[Pair] = Counter()
        where: defaultdict[Pair, set[int]] = defaultdict(set)
        for index, word in enumerate(words):
            for pair in pairwise(word):
                counts[pair] += weights[index]
                where[pair].add(index)
        heap = [(-count, pair) for pair, count in counts.items()]
        heapify(heap)
        merges: list[Pair] = []
        while len(merges) < vocabulary - 256 and heap:
            count, best = heappop(heap)
            if -count != counts[best]:
                continue  # an outdated entry: the pair was pushed again when its count changed
            if -count < 2:
                break
            changed: Counter[Pair] = Counter()
            for index in where.pop(best):
                old, new = words[index], _merged(words[index], best, 256 + len(merges))
                words[index] = new
                for pair in pairwise(old):
                    changed[pair] -= weights[index]
                for pair in pairwise(new):
                    changed[pair] += weights[index]
                    where[pair].add(index)
            for pair in filter(changed.__getitem__, changed):
                counts[pair] += changed[pair]
                heappush(heap, (-counts[pair], pair))
            merges.append(best)
        return cls(merges)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; every text can be encoded."""
        ids: list[int] = []
        for piece in PIECE.findall(text):
            known = self._pieces.get(piece)
            if known is None:
                known = self._pieces[piece] = self._encode_piece(piece)
            ids += known
        return ids

    def _encode_piece(self, piece: str) -> list[int]:
        word = list(piece.encode())
        while len(word) > 1:
            first = min(pairwise(word), key=lambda pair: self._ids.get(pair, 1 << 30))
            if first not in self._ids:
                break
            word = _merged(word, first, self._ids[first])
        return word

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; incomplete characters at the ends are replaced."""
        return b"".join(self._bytes[i] for i in ids).decode(errors="replace")


def _merged(word: list[int], pair: Pair, new: int) -> list[int]:
    out: list[int] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def source_files() -> Iterator[Path]:
    """The standard library's files in a fixed, well mixed order, without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)]
    if not files:
        raise FileNotFoundError(
            f"[pyctrlora.demo] expected the standard library's source below {root}; got no .py "
            "file. Remedy: install the package that holds it, or pass --model DIR."
        )
    # By the reversed name: neighbours in the alphabet share their subject, this order mixes them.
    return iter(sorted(files, key=lambda path: (path.stem[::-1], str(path.relative_to(root)))))


def source_code(characters: int) -> str:
    """The first `characters` characters of the standard library's code in that order.

    Docstrings and comments are left out: English is what the fine-tuning has to teach.
    """
    parts: list[str] = []
    total = 0
    for path in source_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        parts.append(re.sub(r"\n\s*\n", "\n", PROSE_IN_CODE.sub("", text)))
        total += len(parts[-1])
        if total >= characters:
            break
    return "\n".join(parts)[:characters]


def prose() -> str:
    """Python's language reference as shipped in `pydoc_data.topics`, each paragraph once."""
    from pydoc_data.topics import topics

    # Topics repeat whole sections of each other: a repeated paragraph would leak into validation.
    paragraphs = (p for name in sorted(topics) for p in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(p.rstrip() for p in paragraphs if p.strip()))


def split(ids: Tensor, context: int, limit: int = 64) -> tuple[Tensor, Tensor]:
    """Holds out every 8th block of a token stream, so that validation covers all of the text.

    Args:
        ids: (tokens,) the stream.
        context: tokens a window predicts; a window holds one more.
        limit: most validation windows; 64 cost as much as three training steps.

    Returns:
        The training stream (tokens,) and the validation windows (windows, context + 1).

    Raises:
        ValueError: if the stream has fewer than 16 windows.

    Example:
        >>> train, validation = split(torch.arange(1000), context=9)
        >>> train.shape, validation.shape
        (torch.Size([875]), torch.Size([12, 10]))
    """
    window = context + 1
    windows = len(ids) // window
    if windows < 16:
        raise ValueError(
            f"[pyctrlora.demo] expected a text of at least {16 * window} tokens; got {len(ids)}. "
            "Remedy: pass a longer --data file."
        )
    parts = list(ids.tensor_split(max(8, min(64, windows // 32 * 8))))
    held_out = torch.cat([part.unfold(0, window, window) for part in parts[4::8]])
    del parts[4::8]
    chosen = torch.linspace(0, len(held_out) - 1, min(limit, len(held_out))).round().long()
    return torch.cat(parts), held_out[chosen]


def batches(ids: Tensor, context: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    """`steps` batches (batch, context + 1) of windows at random places, fixed by the seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - context, (steps, batch, 1), generator=generator)
    return list(ids[starts + torch.arange(context + 1)])
