"""Products of several networks on their way, against the descent and the theorem."""

import numpy as np
import pytest
import torch

import compressible as cd
from compressible.experiments.trajectories import crowded_marks, paths_in_plane, product_gaps

SIZE, RANK, SCALE, STEP = 12, 2, 0.3, 3.0


def _build(generator):
    problem = cd.MatrixFactorization(cd.low_rank_target((SIZE, SIZE), RANK, generator=generator))
    wide = cd.orthogonal_factors((SIZE, SIZE), scale=SCALE, generator=generator)
    small = cd.compress_from_gradient(problem, wide, RANK)
    return problem, {"original": (wide, STEP, 1.0), "frozen": (small, STEP, 0.0), "wild": (wide, 1e4, 1.0)}


@pytest.fixture(scope="module")
def curves():
    return cd.compare_starts(_build, seed=1, seeds=2, steps=400, record_every=20, tolerance=1e-9)


def test_frames_crowd_towards_the_end():
    marks = crowded_marks(1000, 30)
    assert len(marks) == 30 and (np.diff(marks) >= 0).all()
    assert marks[0] == 0 and marks[-2:].tolist() == [999, 1000]
    assert np.diff(marks)[:10].min() > np.diff(marks)[-5:].max()


def test_the_path_of_the_frozen_network_lies_on_that_of_the_original(curves):
    out = paths_in_plane(_build, curves, seed=1, frames=8)
    assert set(out) == {"original/trajectory", "frozen/trajectory", "shares"}  # the wild one diverges
    assert out["original/trajectory"].shape == (8, 2)
    apart = (out["original/trajectory"] - out["frozen/trajectory"]).abs().max()
    assert apart < 0.05 * out["original/trajectory"].abs().max()
    assert out["shares"][0] > out["shares"][1] > 0 and out["shares"].sum() <= 1 + 1e-9


def test_no_plane_where_the_first_start_diverged(curves):
    with pytest.raises(ValueError, match="original diverged with seed 1, expected a step size"):
        paths_in_plane(_build, curves | {"original/diverged": np.array([True, False])}, seed=1, frames=8)


def test_gaps_of_the_products_are_the_corollarys(curves):
    def pair(generator):
        problem, starts = _build(generator)
        return problem, {name: starts[name] for name in ("original", "frozen")}

    stopped = curves["original/stopped"]
    rhos = cd.theory.rho([SCALE] * 3, STEP / SIZE**2, int(stopped.max()))
    exact = cd.theory.compression_gap(rhos, SIZE, RANK).numpy()
    out = product_gaps(pair, 1, stopped, 10, exact)
    assert out["gap"].shape == out["theory"].shape == out["marks"].shape == (2, 10)
    assert (out["off_theory"] < 1e-6).all()
    assert out["size"][:, -1] == pytest.approx([1.0, 1.0], abs=1e-2)
    wrong = product_gaps(pair, 1, stopped, 10, 2 * exact)
    assert (wrong["off_theory"] > 0.4).all()
    target = pair(torch.Generator().manual_seed(2))[0].target
    assert out["bound"][1] == pytest.approx(exact[0] / float(target.norm()))
