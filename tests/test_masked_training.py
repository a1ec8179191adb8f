"""Autoencoders on masked images: the mask, the standardised pixels, what is measured, and descent to closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from compressible.data.images import ImageData, Images
from compressible.experiments import masked_maps, masked_training
from compressible.networks import models
from compressible.recovery.theory import masking

RATES = [0.0, 0.3, 0.6]


@pytest.fixture(scope="module")
def pixels():
    """Images of 3 smooth patterns and noise; the first column is dark, and left out."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(3, 1, 4, 4, generator=generator).repeat_interleave(2, 2).repeat_interleave(2, 3)

    def part(rows):
        shares = torch.rand(rows, 3, generator=generator)
        values = torch.einsum("nk,kchw->nchw", shares, patterns) * 60 + 20 * torch.rand(
            rows, 1, 8, 8, generator=generator
        )
        values[..., :2] = 0
        return Images(values.to(torch.uint8), torch.zeros(rows, dtype=torch.int64))

    data = ImageData("patterns", part(600), part(200), ("pattern",), torch.zeros(1), torch.ones(1), {})
    return masked_training.standardised_pixels(data, pooling=2, rows=400, validation_rows=100, device="cpu")


def test_pixels_are_standardised_and_go_back_into_images(pixels):
    assert [len(part) for part in (pixels.train, pixels.validation, pixels.test)] == [400, 100, 200]
    assert pixels.kept.tolist() == [[False, True, True, True]] * 4
    torch.testing.assert_close(pixels.moments.diagonal(), torch.ones(12, dtype=torch.float64), atol=1e-12, rtol=0)
    assert pixels.train.mean(0).abs().max() < 1e-12
    images = pixels.images(pixels.test[:2])
    assert not images[:, :, 0].any() and 0.05 < images[:, :, 1:].mean() < 0.9
    again = (images[:, pixels.kept] - pixels.mean) / pixels.deviation
    torch.testing.assert_close(again, pixels.test[:2], atol=1e-9, rtol=0)


def test_mask_hides_its_share_in_training_alone():
    torch.manual_seed(0)
    model, inputs = masked_training.Masked(nn.Identity(), 0.75), torch.ones(200, 50)
    found = model(inputs)
    assert (found == 0).double().mean().item() == pytest.approx(0.75, abs=0.02)
    assert found.unique().tolist() == [0, 4] and torch.equal(model.eval()(inputs), inputs)
    everything = masked_training.Masked(nn.Identity(), 0.0)(inputs)
    assert torch.equal(everything, inputs)


def test_masks_of_an_evaluation_are_the_same_every_time(pixels):
    first, again = (masked_training.masked_inputs(pixels.test, 0.6) for _ in range(2))
    assert torch.equal(first, again)
    assert (first == 0).double().mean().item() == pytest.approx(0.6, abs=0.03)
    torch.testing.assert_close(first[first != 0], (pixels.test / 0.4)[first != 0])


@pytest.fixture(scope="module")
def networks(pixels):
    setting = masked_training.Setting(RATES, [1e-6, 0.01, 0.03], range(2), width=16, steps=400, batch_size=64)
    return masked_training.trained("linear", pixels, setting)


def test_trained_linear_map_is_the_closed_form(pixels, networks):
    """Stacked beside others of another mask rate, each learns the map of its own; steep directions come first."""
    nets, _ = networks
    for rate in RATES[1:]:
        wanted = masking.best_map(pixels.moments, rate)
        for net in nets[rate]:
            body = net.network.body
            found = (body.output.weight @ body.input.weight).detach().double()
            assert torch.linalg.matrix_norm(found - wanted) < 0.12 * torch.linalg.matrix_norm(wanted)


def test_the_best_learning_rate_is_kept(networks):
    _, found = networks
    tried, losses = found["learning_rates"], found["validation"]
    assert losses.shape == (3, len(tried)) and set(tried) >= {1e-6, 0.01, 0.03}
    assert (losses[:, 0] > 0.9).all()  # of a network that hardly moved
    np.testing.assert_array_equal(found["learning_rate"], tried[np.nanargmin(losses, 1)])


def test_grids_grow_until_the_best_learning_rate_lies_inside(pixels):
    """At far too low rates the highest is best, for every mask rate, and up to four more are tried."""
    setting = masked_training.Setting(RATES, [1e-5, 1e-4], range(2), width=16, steps=60, batch_size=64)
    nets, found = masked_training.trained("linear", pixels, setting)
    assert found["learning_rates"].tolist() == pytest.approx([1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
    assert (found["learning_rate"] >= 3e-3).all() and [len(nets[q]) for q in RATES] == [2, 2, 2]
    ends = np.array([np.flatnonzero(np.isfinite(row))[-1] for row in found["validation"]])
    best = np.nanargmin(found["validation"], 1)
    assert found["inside"].tolist() == (best < ends).tolist()
    for q, row in zip(RATES, found["validation"], strict=True):
        losses = [masked_training.masked_loss(net, pixels.validation, q) for net in nets[q]]
        assert np.mean(losses) == pytest.approx(np.nanmin(row))


def test_measures_of_a_linear_network_are_those_of_its_matrix(pixels, networks):
    nets, _ = networks
    found = masked_training.measures(nets, pixels, points=3)
    assert found["values"].shape == (2, 3, 12) and found["loss"].shape == (2, 3, 3)
    body = nets[0.6][1].network.body
    values = torch.linalg.svdvals((body.output.weight @ body.input.weight).detach().double()).numpy()
    np.testing.assert_allclose(found["values"][1, 2], values, atol=1e-5)
    shares = values / values.sum()
    assert found["map rank"][1, 2] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert found["loss"][1, 2, 2] == pytest.approx(masked_training.masked_loss(nets[0.6][1], pixels.test, 0.6))


def test_jacobian_of_a_nonlinear_network_is_its_slope(pixels):
    net = masked_training.Masked(models.seeded(0, models.mlp, 12, 20, 12, activation="gelu"), 0.5).double().eval()
    point = pixels.test[:1]
    slope = torch.autograd.functional.jacobian(lambda row: net(row[None])[0], point[0])
    found = masked_training._map_values(net, point)
    torch.testing.assert_close(found[0], torch.linalg.svdvals(slope), atol=1e-12, rtol=0)


def test_closed_form_has_the_loss_of_sampled_masks(pixels):
    found = masked_training.closed_form(pixels, RATES)
    weight = masking.best_map(pixels.moments, 0.6)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(50):
        kept = torch.rand(pixels.test.shape, generator=generator) >= 0.6
        losses.append((pixels.test - pixels.test * kept / 0.4 @ weight.mT).square().mean().item())
    assert found["loss"][2] == pytest.approx(np.mean(losses), rel=0.01)
    assert found["map rank"][0] == pytest.approx(12) and (np.diff(found["map rank"]) < 0).all()


def test_pictures_hide_what_is_masked(pixels, networks):
    shown = masked_training.pictures(networks[0][0.6][0], pixels, 0.6, count=5)
    assert shown.shape == (4, 5, 4, 4)
    hidden = np.isnan(shown[1])
    assert 0.3 < hidden[:, :, 1:].mean() < 0.9 and not hidden[:, :, 0].any() and np.isfinite(shown[[0, 2, 3]]).all()
    np.testing.assert_array_equal(shown[1][~hidden], shown[0][~hidden])


def test_samples_are_standard_errors_from_the_closed_form(pixels):
    found = np.array([masked_maps.sampling_error(pixels.train[:40], [0.3, 0.8], 100, seed) for seed in range(8)])
    assert found.shape == (8, 2) and np.abs(found).max() < 4.5 and 0.5 < found.std() < 1.6


def test_descent_ends_at_the_closed_forms(pixels):
    found = masked_maps.descent_errors(pixels.moments, [0.5, 0.8], 2, 3000, [0, 1])
    assert found["bottleneck"].shape == found["decay"].shape == (2, 2)
    assert max(errors.max() for errors in found.values()) < 1e-9
    early = masked_maps.descent_errors(pixels.moments, [0.5], 2, 10, [0])
    assert min(errors.min() for errors in early.values()) > 1e-3


def test_midway_decay_leaves_that_many_directions(pixels):
    decay = masked_maps.midway_decay(pixels.moments, 3)
    assert int((torch.linalg.eigvalsh(pixels.moments) > decay).sum()) == 3


def test_what_is_judged():
    ranks = np.array([[9.0, 6.0, 3.0], [9.0, 3.0, 6.0]])
    found = {
        "mask_rates": np.array(RATES), "closed/map rank": np.array([9.0, 6.0, 3.0]),
        "closed/loss": np.array([0.0, 0.5, 1.0]),
        "sampling error": np.array([[1.0, 1.0], [0.0, -2.0]]),
        "descent/bottleneck": np.array([[1e-9, 1e-7]] * 2), "descent/decay": np.array([[1e-9, 1e-8]] * 2),
        "linear/map rank": ranks, "nonlinear/map rank": ranks, "nonlinear/hidden rank": ranks,
        "nonlinear/loss": np.array([[[0.1, 0.8, 2.0], [0.2, 0.4, 1.0], [0.3, 0.5, 0.9]]] * 2),
    }  # fmt: skip
    judged = masked_training.judged(found)
    assert judged["sampling"].tolist() == pytest.approx([2**0.5, -(2**0.5)])
    assert judged["bottleneck"].tolist() == [1e-7] * 2 and judged["decay"].tolist() == [1e-8] * 2
    assert judged["linear rank error"].tolist() == [0, 1]
    assert judged["nonlinear over linear"].tolist() == pytest.approx([0.9] * 2)
    assert judged["masked over unmasked"].tolist() == [0.5] * 2
    assert judged["linear/map order"].tolist() == pytest.approx([-1, -0.5])


@pytest.mark.parametrize("rates", [[0.1, 0.5, 0.9], [0.0, 0.5], [0.0, 0.5, 0.2], [0.0, 0.5, 0.5]])
def test_mask_rates_that_show_nothing_are_refused(rates):
    with pytest.raises(ValueError, match="mask_rates is"):
        masked_training.check_mask_rates(rates)
