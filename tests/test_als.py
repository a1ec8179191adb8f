"""Alternating least squares from entries is the dense one, exact, monotone, and recovers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic")  # a GPU host may have PyTorch, Triton and pytest alone
from reference_als import alternate_densely, solve_rows

import compressible as cd
from compressible.recovery.als import alternate

CUDA = torch.cuda.is_available()
ON_CUDA = (pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="needs a CUDA device"))
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank(m: int, n: int, rank: int, p: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    left = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    mask = (torch.rand(m, n, generator=generator, dtype=torch.float64) < p).double()
    return left @ right.T, mask


def entries(target: torch.Tensor, mask: torch.Tensor, hidden: bool = False, device: str = "cpu") -> cd.SparseCompletion:
    """The entries where `mask` is 1; the others hidden, or of no concern."""

    def part(chosen):
        indices = chosen.nonzero().T
        return torch.sparse_coo_tensor(indices, target[*indices], target.shape, check_invariants=True).to(device)

    return cd.SparseCompletion(part(mask == 1), part(mask == 0) if hidden else None)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_rows_equal_lstsq_also_when_short_or_empty(ridge):
    """The first half of a sweep solves for U given V, the second for V given U: here the last of each is looked at."""
    target, mask = low_rank(14, 9, 6, 0.6)
    target = target + torch.randn(14, 9, generator=seeded(2), dtype=torch.float64)
    mask[:, 3] = 0.0  # no observation
    mask[:, 5] = 0.0
    mask[:2, 5] = 1.0  # fewer observations than the rank
    v, u = alternate(entries(target, mask), 4, ridge, 1, seeded(), start="random").factors
    for column in range(9):
        seen = mask[:, column].bool()
        design = np.vstack([u[seen].numpy(), math.sqrt(ridge) * np.eye(4)])
        values = np.concatenate([target[seen, column].numpy(), np.zeros(4)])
        exact = np.linalg.lstsq(design, values, rcond=1e-10)[0]
        np.testing.assert_allclose(v[:, column], exact, atol=1e-8)
    assert (v[:, 3] == 0).all()
    right = torch.randn(9, 4, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(u, solve_rows(target, mask, right, ridge), rtol=1e-8, atol=1e-9)


def test_a_weighted_ridge_counts_once_for_each_entry_of_a_line():
    target, mask = low_rank(20, 12, 3, 0.5)
    mask[:, 4] = 0.0  # a column without an entry
    v, u = alternate(entries(target, mask), 2, 0.1, 3, seeded(), start="random", weighted=True).factors
    for column in range(12):
        seen = mask[:, column].bool()
        normal = u[seen].T @ u[seen] + 0.1 * max(int(seen.sum()), 1) * torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(v[:, column], torch.linalg.solve(normal, u[seen].T @ target[seen, column]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_least_squares_from_entries_is_the_dense_one(device, ridge):
    target, mask = low_rank(40, 30, 3, 0.5)
    right = torch.randn(30, 2, generator=seeded(), dtype=torch.float64)
    losses, matrix = alternate_densely(target, mask, right, ridge, 12)
    for start in ("random", right):
        fit = alternate(entries(target, mask, device=device), 2, ridge, 12, seeded(), start=start)
        np.testing.assert_allclose(fit.loss, losses, rtol=1e-9)
        torch.testing.assert_close((fit.factors[1] @ fit.factors[0]).cpu(), matrix, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("start", ["spectral", "random"])
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_objective_never_rises(start, ridge):
    target, mask = low_rank(40, 30, 8, 0.5)
    sweeps = 40
    found = alternate(entries(target, mask), 3, ridge, sweeps, seeded(), start=start, snapshots=range(sweeps + 1))
    squares = torch.tensor([sum(f.square().sum() for f in found.snapshots[s]) for s in range(sweeps + 1)])
    objective = 2 * mask.sum() * found.loss + ridge * squares.double()
    assert len(objective) == 41 and (objective[2:] <= objective[1:-1] * (1 + 1e-6)).all()
    by_hand = (mask * (found.factors[1] @ found.factors[0] - target)).square().sum() / mask.sum() / 2
    assert found.loss[-1].item() == pytest.approx(float(by_hand), rel=1e-9)
    assert (found.seconds.diff() >= 0).all() and found.error.isnan().all()
    torch.testing.assert_close(found.snapshots[sweeps], found.factors, rtol=0, atol=0)


@pytest.mark.parametrize("start", ["spectral", "random"])
def test_exact_low_rank_matrix_is_recovered(start):
    target, mask = low_rank(60, 50, 3, 0.5)
    found = alternate(entries(target, mask, hidden=True), 3, 0.0, 60, seeded(), start=start)
    assert found.error[-1] < 1e-18
    torch.testing.assert_close(found.factors[1] @ found.factors[0], target, rtol=0, atol=1e-8)


def test_full_mask_gives_the_best_approximation():
    target, _ = low_rank(20, 15, 10, 1.0)
    found = alternate(entries(target, torch.ones_like(target)), 4, 0.0, 300, seeded(), start="random")
    tail = torch.linalg.svdvals(target)[4:].square().sum()
    assert 2 * 300 * found.loss[-1].item() == pytest.approx(float(tail), rel=1e-9)


def test_the_biased_model_is_stationary_at_convergence():
    target, mask = low_rank(30, 25, 2, 0.6)
    target = target + torch.randn(30, 1, generator=seeded(1)).double() + torch.randn(25, generator=seeded(2)).double()
    v, u = alternate(entries(target, mask), 2, 1.5, 2000, seeded(), True, 0.5, "random").factors
    parts = [part.clone().requires_grad_() for part in (u[:, 2], v[3], u[:, :2], v[:2])]
    assert (u[:, 3] == 1).all() and (v[2] == 1).all()
    a, b, p, q = parts
    residual = mask * (a[:, None] + b + p @ q - target)
    penalty = 0.5 * (a.square().sum() + b.square().sum()) + 1.5 * (p.square().sum() + q.square().sum())
    (residual.square().sum() + penalty).backward()
    assert max(float(part.grad.abs().max()) for part in parts) < 1e-6


def test_same_seed_same_numbers_and_input_untouched():
    problem = entries(*low_rank(20, 15, 2, 0.5))
    before = problem.seen.rows.values.clone()
    runs = [alternate(problem, 2, 0.1, 5, seeded(3), start="random") for _ in "ab"]
    torch.testing.assert_close(runs[0].factors, runs[1].factors, rtol=1e-9, atol=1e-12)
    assert torch.equal(problem.seen.rows.values, before)


def test_a_ridge_below_round_off_is_no_error():
    target, mask = low_rank(40, 30, 2, 0.5)
    fit = alternate(entries(1e6 * target, mask), 5, 1e-12, 5)
    assert torch.isfinite(fit.loss).all() and fit.loss[-1] < 1e-3 * fit.loss[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 16}, "rank is 16, expected an integer from 1 to 15"),
        ({"ridge": -1.0}, "ridge is -1"),
        ({"ridge": math.nan}, "ridge is nan"),
        ({"ridge": 0.0, "biases": True}, "> 0 with biases"),
        ({"sweeps": 0}, "sweeps is 0"),
        ({"start": "warm"}, "start is 'warm'"),
        ({"start": torch.zeros(20, 2)}, r"start has shape \(20, 2\), expected \(n, k\) = \(15, 2\)"),
        ({"start": torch.zeros(15, 2), "biases": True, "ridge": 1.0}, r"expected \(n, k\) = \(15, 3\)"),
    ],
)
def test_impossible_input_is_refused(options, message):
    problem = entries(*low_rank(20, 15, 2, 0.5))
    with pytest.raises(ValueError, match=message):
        alternate(problem, **({"rank": 2} | options))
