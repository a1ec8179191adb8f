"""Noisy and unevenly observed completion: the stacks of problems, and what networks lose on them."""

import numpy as np
import pytest
import torch

import compressible as cd
from compressible.experiments import imperfect_observation as imperfect


@pytest.fixture
def target():
    return cd.low_rank_target((12, 12), 2, (2,), torch.Generator().manual_seed(0))


def test_noise_is_scaled_and_only_on_observed_entries(target):
    problem = imperfect.noisy_completion(target, 0.5, [0.0, 0.1, 0.2], torch.Generator().manual_seed(1))
    assert tuple(problem.batch_shape) == (3, 2)
    noise = (problem.target - target) * torch.ones(3, 1, 1, 1)
    assert noise[0].abs().max() == 0 and (noise * (1 - problem.mask)).abs().max() == 0
    torch.testing.assert_close(2 * noise[1], noise[2])
    level = noise[2].square().sum((1, 2)) / problem.mask.expand(3, 2, 12, 12)[2].sum((1, 2))
    ratio = level.sqrt() / target.square().mean((1, 2)).sqrt()
    assert ((ratio > 0.15) & (ratio < 0.25)).all()


def test_skewed_masks_hold_as_many_entries_and_reweighting_undoes_the_skew(target):
    generator = torch.Generator().manual_seed(1)
    problem, weighted = imperfect.skewed_completion(target, 0.5, [0.0, 2.0], generator)
    mask = problem.mask
    assert (mask.sum((-2, -1)) == 72).all() and tuple(problem.batch_shape) == (2, 2)
    assert mask[1, :, 0].mean() > mask[1, :, -1].mean()
    seen = mask > 0
    torch.testing.assert_close(weighted[0][seen[0]], 2 * target[seen[0]])  # every chance is one half
    assert (weighted[~seen] == 0).all() and (weighted[1][seen[1]] / target[seen[1]] > 0.99).all()


def test_descent_over_a_stack_and_the_angles_of_surrogates(target):
    problem = imperfect.noisy_completion(target, 0.9, [0.0, 0.5], torch.Generator().manual_seed(1))
    start = cd.compress_spectral(problem, 4, 3, 0.3)
    found = imperfect.descend_from(problem, {"small": start}, step_size=2.0, steps=600, record_every=50)
    assert found["small/final"].shape == found["small/best"].shape == found["small/times"].shape == (2, 2)
    assert (found["small/best"] <= found["small/final"] + 1e-15).all()
    assert (found["small/final"][1] > found["small/final"][0]).all() and found["runs"] == 4
    assert found["small/curve"].shape == (2, len(found["small/at"]))
    assert np.isinf(found["small/overfits"][0]).all() and np.isinf(found["small/times"][1]).all()
    angles = imperfect.surrogate_angles(target, 2, {"exact": (target[None], 2), "noisy": (problem.surrogate(), 2)})
    assert (angles["exact/angle"] < 1e-6).all()
    assert (angles["noisy/angle"][1] > angles["noisy/angle"][0]).all()


def test_least_squares_error_by_hand():
    target = torch.full((1, 10, 10), 2.0, dtype=torch.float64)
    share = 1 * 19 / (0.5 * 100)
    expected = 0.5 * 4.0 / 2 * share / (1 - share)  # (1/sqrt 2 of an rms of 2)^2 is 2
    out = imperfect.least_squares_error(target, 1, 0.5, np.array([0.0, 0.5**0.5]))
    np.testing.assert_allclose(out, [[0.0], [expected]])


def test_what_noise_and_skew_come_to_by_hand():
    ends = {"original": [[1e-9], [0.2], [1.0]], "width 2r": [[1e-9], [0.4], [1.5]], "width r": [[1e-9], [0.1], [0.5]]}
    found = {f"{name}/final": np.array(end) for name, end in ends.items()}
    found |= {f"{name}/best": np.array([[1e-9], [0.1], [0.4]]) for name in ends}
    found["width 2r/angle"] = np.array([[0.2], [0.3], [0.9]])
    found |= {"width 2r/overfits": np.array([[np.inf], [60.0], [30.0]]), "original/at": np.array([0, 50, 100])}
    found["original/overfits"] = np.array([[np.inf], [np.inf], [40.0]])  # the budget counts where it never does
    out = imperfect.judge_noise(found, [0.0, 0.5, 1.0], np.array([[0.0], [0.2], [0.8]]))
    expected = {"width 2r over original": 2.0, "width r over original": 0.5, "best over original": 1.0}
    expected |= {"r over least squares": 0.5, "turn": 1.5, "r at most noise": 0.5, "overfit ratio": 0.6}
    assert {name: float(out[name][0]) for name in expected} == pytest.approx(expected)

    uneven = {"original/final": np.array([[0.0], [0.0], [1.0]]), "width 2r/final": np.array([[0.0], [1.0], [0.0]])}
    uneven |= {"original/times": np.array([[100.0], [200.0], [np.inf]])}
    uneven |= {"width 2r/times": np.array([[90.0], [220.0], [50.0]])}
    uneven |= {"width 2r/angle": np.array([[0.1], [0.5], [0.7]]), "reweighted/angle": np.array([[0.1], [0.2], [0.8]])}
    uneven["original/at"] = np.array([0, 150, 300])
    out = imperfect.judge_skew(uneven, [0.0, 1.0, 2.0])
    assert out["recovers to"] == [0.0] and not out["as original"].any()
    assert out["iteration ratio"] == pytest.approx([1.1]) and out["reweighting"] == pytest.approx([0.1])


@pytest.mark.parametrize("levels", [[0.0], [0.1, 0.2], [0.0, 0.2, 0.1], [0.0, 0.1, 0.1]])
def test_levels_that_do_not_ascend_from_zero_are_refused(levels):
    imperfect.check_levels(skews=[0.0, 1.0])
    with pytest.raises(ValueError, match=r"skews are .*expected 0"):
        imperfect.check_levels(skews=levels)
