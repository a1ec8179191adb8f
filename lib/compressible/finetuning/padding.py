"""Less padding: a run's rows of a step by length, in parts that are padded to their own longest row.

A part holds the rows of the same ranks of all runs: the twelve shortest of each run's sixteen, say. What the model
makes of the parts is joined before losses are taken, and dropout knows the rows by their numbers in their batches, so
that a run stays the same. Parts and lengths are chosen once a pass, for a step is one CUDA graph for its lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import torch
from torch import Tensor

from compressible.finetuning.batches import DeviceRows

MULTIPLES = {"cpu": 8, "cuda": 16}  # of padded lengths: these are chosen, so that they may be finer than a whole step's
PARTS = 3  # of a step at most
GRAPHS = 6  # of a pass at most
COST = {"cpu": 32, "cuda": 1500}  # of a further part, in tokens: its kernels are as many, each of them smaller
CAPTURE = {"cpu": 0, "cuda": 250_000}  # of a graph, in tokens: about a second
NUMBERS = "numbers of rows"


class Parts:
    """How the steps of a pass are cut: order (steps, S, B) are rows of the given lengths (N,).

    ends: of the parts, in ranks. lengths (steps, parts): what they are padded to.
    """

    def __init__(self, order: Tensor, lengths: Tensor, kind: str) -> None:
        own = lengths[order]
        self.multiple = MULTIPLES[kind]
        self.numbers = own.argsort(dim=2, stable=True)
        self.order = order.gather(2, self.numbers)
        longest = own.gather(2, self.numbers).amax(1)
        padded = -(-longest // self.multiple) * self.multiple
        runs = order.shape[1]
        self.ends = best_ends(runs * padded.double().mean(0), COST[kind])
        rows = torch.tensor([runs * (end - begin) for begin, end in pairwise((0, *self.ends))])
        self.lengths = few(padded[:, [end - 1 for end in self.ends]], rows, CAPTURE[kind])

    def batch(self, rows: DeviceRows, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return tokens by part and name, the rows' numbers in their batches among them, and labels (S * B, ...)."""
        found: dict[str, Tensor] = {}
        device = rows.labels.device
        for part, (begin, end) in enumerate(pairwise((0, *self.ends))):
            which, numbers = (of[step, :, begin:end].reshape(-1) for of in (self.order, self.numbers))
            tokens, _ = rows.batch(which, self.multiple, int(self.lengths[step, part]))
            tokens[NUMBERS] = numbers.int().to(device, non_blocking=True)
            found |= {f"{part} {name}": value for name, value in tokens.items()}
        return found, rows.labels[self.order[step].reshape(-1).to(device, non_blocking=True)]


def are_parts(tokens: dict[str, Tensor]) -> bool:
    """Whether these are of `Parts.batch`."""
    return f"0 {NUMBERS}" in tokens


def parts_of(tokens: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Return the tokens (S * B', T') by name of each part and the numbers (S * B',) of its rows."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tokens.items():
        part, own = name.split(" ", 1)
        parts.setdefault(part, {})[own] = value
    return [(part, part.pop(NUMBERS)) for part in parts.values()]


def joined(found: Sequence[Tensor], runs: int) -> Tensor:
    """Return outputs (S * B, ...), run by run, from those of the parts (S * B', ...)."""
    return torch.cat([part.unflatten(0, (runs, -1)) for part in found], 1).flatten(0, 1)


def best_ends(tokens: Tensor, cost: float) -> tuple[int, ...]:
    """Return the ends of the parts that cost least, by the mean tokens (B,) of all runs' rows of one rank."""
    ranks = len(tokens)
    cuts = [cut for count in range(PARTS) for cut in combinations(range(1, ranks), count)]

    def total(cut: tuple[int, ...]) -> float:
        spans = pairwise((0, *cut, ranks))
        return cost * len(cut) + sum((end - begin) * each[end - 1] for begin, end in spans)

    each = tokens.tolist()
    return *min(cuts, key=total), ranks


def few(lengths: Tensor, rows: Tensor, cost: int) -> Tensor:
    """Return lengths (steps, parts), none smaller, of which GRAPHS differ at most; rows (parts,) of all runs.

    Those that together grow least become one, also where they grow by less than `cost` tokens in all steps.
    """
    kinds, of, counts = lengths.unique(dim=0, return_inverse=True, return_counts=True)
    while len(kinds) > 1:
        joint = torch.maximum(kinds[:, None], kinds)
        grown = ((joint - kinds[:, None]) * rows).sum(2) * counts[:, None]
        added = (grown + grown.T).fill_diagonal_(torch.iinfo(torch.int64).max)
        if len(kinds) <= GRAPHS and added.min() >= cost:
            break
        into, gone = sorted(divmod(int(added.argmin()), len(kinds)))
        kinds[into] = joint[into, gone]
        counts[into] += counts[gone]
        kept = torch.arange(len(kinds)) != gone
        kinds, counts = kinds[kept], counts[kept]
        of = torch.where(of == gone, into, of - (of > gone).long())
    return kinds[of]
