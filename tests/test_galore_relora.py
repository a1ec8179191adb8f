"""The protocol of P3's Theorem 4: its objectives, its distances, and the choice of rates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compressible.data.images import ImageData, Images
from compressible.experiments import galore_relora, low_rank_steps
from compressible.experiments.low_rank_steps import Steps

HOW = Steps("galore", "gd", 1.0, rank=3, period=5, steps=12)


def part(rows, seed):
    """Images whose class is the place of a bright square, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (rows,), generator=generator)
    pixels = torch.randint(60, (rows, 1, 28, 28), generator=generator, dtype=torch.uint8)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[0, 4 + 10 * (label // 5) :, 5 * (label % 5) : 5 * (label % 5) + 4] = 200
    return Images(pixels, labels)


@pytest.fixture(scope="module")
def data():
    none = torch.zeros(1)
    return ImageData("squares", part(200, 0), part(50, 1), tuple("0123456789"), none, none + 1, {})


def test_problems_are_scaled_to_a_largest_curvature_of_one(data):
    """The Hessian of least squares is the covariance; digits have the same, and both sums of the loss agree."""
    for objective in galore_relora.objectives(data, 0, 60, 16).values():
        inputs = objective.train.args[1][0]
        covariance = inputs.mT @ inputs / len(inputs)
        assert torch.linalg.matrix_norm(covariance, ord=2).item() == pytest.approx(1, rel=1e-9)
        torch.testing.assert_close(objective.train(objective.model), objective.reordered(objective.model))
        assert all(weight.shape[0] < weight.shape[1] for weight in objective.model.parameters())


def test_digits_for_training_and_validation_are_apart(data):
    objective = low_rank_steps.digits(data, 0, 90)
    rows = [loss.args[1][0] for loss in (objective.train, objective.validation, objective.test)]
    assert [len(found) for found in rows] == [90, 90, 50]
    assert torch.cdist(rows[0], rows[1]).min() > 1e-3


@pytest.mark.parametrize("rule", low_rank_steps.RULES)
def test_full_matrices_take_the_plain_steps(rule):
    objective = low_rank_steps.regression(0)
    found = list(low_rank_steps.matrices(objective, replace(HOW, method="full", rule=rule, rate=0.1)))
    weight = objective.model[0].weight
    plain = {"gd": torch.optim.SGD, "adam": torch.optim.Adam}[rule]([weight], lr=0.1)
    for step in range(4):
        torch.testing.assert_close(found[step][0], weight.detach(), atol=2e-3, rtol=0)  # Adams differ in eps
        plain.zero_grad()
        objective.train(objective.model).backward()
        plain.step()


@pytest.mark.parametrize("rule", low_rank_steps.RULES)
def test_theorem_four_and_where_it_ends(data, rule):
    objective = low_rank_steps.digits(data, 0, 60, 16)
    found = galore_relora.departures(objective, replace(HOW, rule=rule, rate=1.0 if rule == "gd" else 0.01))
    assert {name: gap.shape for name, gap in found.items()} == dict.fromkeys(galore_relora.KINDS, (13,))
    assert max(found["shared"].max(), found["frozen"].max(), found["rounding"].max()) < 1e-11
    assert found["trained"][1] < 1e-12 < 1e-4 < found["trained"][5]  # the first step after a restart moves A alone
    assert found["published"][1] > 1e-2


def test_distances_are_shares_of_the_way():
    """Published ReLoRA that hardly moves stays away by the whole way of GaLore."""
    found = galore_relora.departures(low_rank_steps.regression(0), replace(HOW, rate=0.01, period=1))
    assert found["published"].max() == pytest.approx(0.9, abs=0.15)


def test_another_order_of_sums_changes_the_last_bits_only():
    objective = low_rank_steps.regression(1)
    paths = [list(low_rank_steps.matrices(objective, HOW, reordered=turned)) for turned in (False, True)]
    gaps = [float((a[0] - b[0]).abs().max()) for a, b in zip(*paths, strict=True)]
    assert 0 < max(gaps) < 1e-12


def test_the_rate_of_least_validation_loss_is_taken():
    objectives = [low_rank_steps.regression(seed) for seed in range(2)]
    found = galore_relora.tuned(objectives, HOW, [1e-4, 0.5, 1e6])
    assert found["rate"] == 0.5 and not found["at_end"]
    assert np.isnan(found["validation"][:, 2]).all() and np.isfinite(found["validation"][:, :2]).all()
    assert found["train"].shape == (2, 13) and (found["train"][:, -1] < found["train"][:, 0]).all()
    alone = galore_relora.outcome(objectives[1], replace(HOW, rate=0.5, seed=1))
    assert found["test"][1] == alone["test"] and found["validation"][1, 1] == alone["validation"]
    assert galore_relora.tuned(objectives, HOW, [1e-4, 0.5])["at_end"]
    with pytest.raises(ValueError, match="expected one at which no run of 'galore' diverges"):
        galore_relora.tuned(objectives, HOW, [1e6])


def test_what_is_judged_reads_the_right_periods(data):
    problems = [galore_relora.objectives(data, seed, 60, 16) for seed in range(2)]
    found = galore_relora.equality(problems, {"gd": 1.0, "adam": 0.01}, [1, 4], rank=3, steps=8)
    judged = galore_relora.judged(found, [1, 4])
    assert all(values.shape == (2,) for values in judged.values())
    assert (judged["shared"] < 1e-11).all() and (judged["both trained"] > 1e-3).all()
    frozen = np.stack([found["gd/frozen"], found["adam/frozen"]])
    assert judged["own P"].tolist() == frozen.max((0, 2, 3)).tolist()
    trained = np.stack([found["gd/trained"], found["adam/trained"]])
    assert judged["both trained"].tolist() == trained[..., 1].min((0, 2)).tolist()
    assert found["path/published"].shape == (2, 9)


@pytest.mark.parametrize("periods", [[2, 4], [1], [1, 4, 4], [1, 20]])
def test_periods_that_show_nothing_are_refused(periods):
    with pytest.raises(ValueError, match="periods are"):
        galore_relora.check_periods(periods, 10)


def test_unknown_methods_and_rules_are_refused():
    with pytest.raises(ValueError, match="method is 'lora', expected one of full, galore, frozen"):
        replace(HOW, method="lora")
    with pytest.raises(ValueError, match="rule is 'sgd', expected one of gd, adam"):
        replace(HOW, rule="sgd")
