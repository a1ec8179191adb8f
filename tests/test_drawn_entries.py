"""Entries drawn from a low-rank matrix that is never formed: distinct, uniform, of unit variance."""

import pytest
import torch

import compressible as cd


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("shape", "count"), [((40, 30), 500), ((40, 30), 60), ((300, 200), 2000)])
def test_drawn_entries_are_distinct_and_of_one_low_rank_matrix(shape, count):
    observed, hidden = cd.sparse_low_rank(shape, 2, count, seeded(), hidden=50)
    assert observed.shape == hidden.shape == shape and (observed._nnz(), hidden._nnz()) == (count, 50)
    places = torch.cat([part.indices()[0] * shape[1] + part.indices()[1] for part in (observed, hidden)])
    assert len(places.unique()) == count + 50
    again = cd.sparse_low_rank(shape, 2, count, seeded(), hidden=50)[0]
    assert torch.equal(again.indices(), observed.indices()) and torch.equal(again.values(), observed.values())


def test_all_drawn_entries_together_are_the_matrix_and_have_unit_variance():
    parts = cd.sparse_low_rank((60, 50), 3, 2000, seeded(1), hidden=1000)
    values = torch.linalg.svdvals(sum(part.to_dense() for part in parts))
    assert values[3] < 1e-12 * values[0] and values[2] > 1
    assert float(values.square().sum() / 3000) == pytest.approx(1, abs=0.3)


def test_drawn_places_are_uniform():
    counts = torch.zeros(6, 5)
    for seed in range(300):
        counts += (cd.sparse_low_rank((6, 5), 1, 6, seeded(seed), hidden=1)[0].to_dense() != 0).float()
    assert float(((counts - 60) ** 2 / 60).sum()) < 60  # chi square of 29 degrees, 60 is beyond the 99.9th percentile


@pytest.mark.parametrize(("rank", "count", "hidden"), [(0, 5, 1), (4, 5, 1), (1, 0, 1), (1, 5, 0), (1, 12, 1)])
def test_impossible_draws_are_refused(rank, count, hidden):
    with pytest.raises(ValueError, match="expected"):
        cd.sparse_low_rank((3, 4), rank, count, hidden=hidden)
