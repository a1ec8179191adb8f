"""Entries to complete, in three parts: those to fit, the validation slice that chooses settings, the test entries.

Entries are ratings (m users, n items) or drawn from a known matrix. Whatever is chosen is chosen on `Task.trial`, which
holds no test entry, so that the test entries are scored and never chosen on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from compressible.data.ratings import Ratings, Split, center, rating_metrics, validation_slice
from compressible.recovery.factors import product
from compressible.recovery.problems import MatrixCompletion
from compressible.recovery.sparse import Entries, SparseCompletion
from compressible.recovery.synthetic import sparse_low_rank
from compressible.runtime.devices import resolve_device

Completion = SparseCompletion | MatrixCompletion
RECOVERED = 1e-8  # of the held-out entries' root mean square: a smaller error counts as none


@dataclass(frozen=True, eq=False)
class Task:
    """`trial` trains on the fit part and errs over the validation slice, `whole` on both parts and over `test`.

    Of a rating table, `ratings` and `index` (N,) say which ratings the test entries are. A trial whose error (half mean
    square) is below `floor` has recovered the slice.
    """

    trial: Completion
    whole: Completion
    test: Entries
    ratings: Ratings | None = None
    index: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    floor: float = 0.0

    def score(self, factors: Sequence[Tensor]) -> dict[str, float]:
        """Return the errors of [W_1, ..., W_L] on the test entries: "rmse", for ratings all of `rating_metrics`."""
        residual = self.test.residual(factors[-1], product(factors[:-1]).mT.contiguous()).cpu().numpy()
        if self.ratings is None:
            return {"rmse": float(np.sqrt(np.mean(residual**2)))}
        return rating_metrics(self.ratings.ratings[self.index] + residual, self.ratings, self.index)


def rating_task(
    ratings: Ratings,
    parts: Split,
    centring: str = "global",
    fraction: float = 0.1,
    device: str = "auto",
    problem: str = "sparse",
) -> Task:
    """Return the task of a rating table (m users, n items); offsets as in `ratings.center`, from what is trained on.

    A "dense" `problem` holds all m n residuals of a step, as P2's loop does, a "sparse" one those of the entries alone.
    Networks of full width take their steps many times faster on the dense one.
    """
    if problem not in ("sparse", "dense"):
        raise ValueError(f'problem is {problem!r}, expected "sparse" or "dense"')
    pairs = [validation_slice(parts, fraction), (parts.train, np.sort(parts.test))]
    trial, whole = (_completion(ratings, *pair, centring, resolve_device(device)) for pair in pairs)
    made = [_dense(each) if problem == "dense" else each for each in (trial, whole)]
    return Task(made[0], made[1], _hidden(whole), ratings, pairs[1][1], _floor(trial))


def drawn_task(
    shape: tuple[int, int],
    rank: int,
    count: int,
    generator: torch.Generator | None = None,
    fraction: float = 0.1,
    device: str = "auto",
) -> Task:
    """Return the task of `count` entries of a rank-r matrix (`sparse_low_rank`), the test a tenth as many hidden ones.

    The slice is a random `fraction` of the observed entries. Raises ValueError as `sparse_low_rank`.
    """
    observed, hidden = sparse_low_rank(shape, rank, count, generator)
    order, cut = torch.randperm(count, generator=generator), round(fraction * count)
    place = resolve_device(device)
    trial = SparseCompletion(_subset(observed, order[cut:]).to(place), _subset(observed, order[:cut]).to(place))
    whole = SparseCompletion(observed.to(place), hidden.to(place))
    return Task(trial, whole, _hidden(whole), floor=_floor(trial))


def rms(task: Task) -> float:
    """Return the root mean square of the test entries."""
    return float(task.test.rows.values.square().mean().sqrt())


def _floor(trial: SparseCompletion) -> float:
    return RECOVERED**2 * float(_hidden(trial).rows.values.square().mean() / 2)


def _completion(
    ratings: Ratings, train: np.ndarray, held_out: np.ndarray, centring: str, device: str
) -> SparseCompletion:
    offsets = center(ratings, train, centring)

    def entries(index: np.ndarray) -> scipy.sparse.coo_array:
        users, items = ratings.users[index], ratings.items[index]
        values = ratings.ratings[index] - offsets.at(users, items)
        return scipy.sparse.coo_array((values, (users, items)), shape=ratings.shape)

    return SparseCompletion(entries(train), entries(held_out), device=device)


def _dense(problem: SparseCompletion) -> MatrixCompletion:
    target = torch.full(problem.shape, torch.nan, dtype=problem.dtype, device=problem.device)
    for entries in (_hidden(problem), problem.seen):
        target[entries.rows.lines(), entries.rows.indices.long()] = entries.rows.values
    mask = problem.seen.matrix(torch.ones_like(problem.seen.rows.values)).to_dense()
    return MatrixCompletion(target, mask)


def _hidden(problem: SparseCompletion) -> Entries:
    if problem.unseen is None:
        raise ValueError("the problem hides no entry, expected some to err over")
    return problem.unseen


def _subset(entries: Tensor, index: Tensor) -> Tensor:
    indices, values = entries.indices()[:, index], entries.values()[index]
    return torch.sparse_coo_tensor(indices, values, entries.shape, check_invariants=False)
