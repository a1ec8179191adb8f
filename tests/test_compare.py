"""Several starts over seeds: gathered curves and what they come to."""

import numpy as np
import pytest
import torch

import compressible as cd
from compressible.compare import compare_starts, first_below, milestones, worst_ratio


def _build(generator):
    problem = cd.MatrixFactorization(cd.low_rank_target((10, 10), 2, generator=generator))
    wide = cd.orthogonal_factors((10, 10), scale=0.5, generator=generator)
    small = cd.compress_spectral(problem, 4, scale=0.5)
    return problem, {"wide": (wide, 2.0, 1.0), "small": (small, 2.0, 1.0), "wild": (wide, 1e4, 1.0)}


def test_curves_are_those_of_the_seeds_alone():
    arrays = compare_starts(_build, seed=3, seeds=2, steps=300, record_every=20, tolerance=1e-3)
    problem, starts = _build(torch.Generator().manual_seed(4))
    alone = cd.descend(problem, starts["small"][0], 2.0, 300, record_every=20, tolerance=1e-3)
    length = len(alone.iterations)
    np.testing.assert_allclose(arrays["small/error"][1, :length], alone.error.numpy(), rtol=1e-12)
    assert np.isnan(arrays["small/error"][1, length:]).all() and arrays["small/stopped"][1] == alone.stopped
    assert arrays["wide/parameters"][0] == 300 and arrays["small/parameters"][0] == 96
    assert arrays["wild/diverged"].all() and not arrays["small/diverged"].any()


def test_milestones_by_hand():
    curves = {"a/iterations": np.array([0, 10, 20]), "a/error": np.array([[4.0, 2.0, 0.5], [4.0, 3.0, 2.0]]),
              "a/seconds": np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]),
              "b/iterations": np.array([0, 10]), "b/error": np.array([[4.0, 0.5], [4.0, 0.1]]),
              "b/seconds": np.array([[0.0, 0.5], [0.0, 0.5]])}  # fmt: skip
    out = milestones(curves, ["a", "b"], level=1.0)
    np.testing.assert_array_equal(out["a/to_level"], [20.0, np.nan])
    np.testing.assert_array_equal(out["b/iteration_ratio"], [0.5, np.nan])
    np.testing.assert_array_equal(out["b/speedup"], [4.0, np.nan])
    np.testing.assert_allclose(out["b/worst_ratio"], [1.0, 1.0])
    np.testing.assert_allclose(out["b/final"], [0.5, 0.1])


def test_first_below_and_worst_ratio_ignore_padding():
    error = np.array([[3.0, 1.0, np.nan]])
    assert first_below(error, 2.0, np.array([0, 5, 10]))[0] == 5
    assert worst_ratio(error, np.array([[1.5, 2.0]]))[0] == pytest.approx(2.0)
