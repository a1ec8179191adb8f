"""Updates of weight matrices over training: P1's theorem for K outputs, shares of energy, rates and controls."""

import numpy as np
import pytest
import torch

from compressible.data.images import ImageData, Images
from compressible.experiments import update_growth as growth
from compressible.experiments.rate_grid import at_best_rate
from compressible.networks import models
from compressible.networks.training import Examples, train
from compressible.recovery import spectra

INPUTS, WIDTH, CLASSES, LEADING = 14, 12, 3, 6
DESCENT = {"optimizer": "sgd", "momentum": 0.0, "device": "cpu"}


def _examples(seed=0, rows=60):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, INPUTS, generator=generator) * torch.linspace(0.2, 2, INPUTS)
    return Examples(inputs, (inputs @ torch.randn(INPUTS, CLASSES, generator=generator)).argmax(1))


def _linear(examples, seeds=(0, 1), rate=0.1, steps=60):
    made = [models.mlp(examples.inputs.shape[1], WIDTH, CLASSES, 2, "identity") for _ in seeds]
    nets = [growth.linear_network(net, 0.4, seed).double() for net, seed in zip(made, seeds, strict=True)]
    options = {"learning_rates": [rate] * len(seeds), "steps": steps, "loss": "squared", "evaluate_every": 20}
    return growth.update_spectra(nets, examples, leading=LEADING, **options, **DESCENT)


def test_on_white_inputs_exactly_2k_singular_values_move_and_otherwise_more():
    examples = _examples()
    white = _linear(growth.whitened_examples(examples, INPUTS))
    plain = _linear(examples)
    assert white["moved"].tolist() == [LEADING, LEADING]
    np.testing.assert_allclose(white["end_energy"], 1, atol=1e-12)
    assert (plain["moved"] > LEADING).all()


def test_a_step_of_one_example_moves_one_value():
    """Its gradient is one outer product, whatever the activation."""
    one = Examples(_examples().inputs[:1], torch.tensor([1]))
    nets = [models.seeded(seed, models.mlp, INPUTS, WIDTH, CLASSES).double() for seed in range(2)]
    found = growth.update_spectra(nets, one, leading=2, learning_rates=[0.5, 0.5], steps=1, **DESCENT)
    np.testing.assert_allclose(found["end_half_energy"], 1, atol=1e-12)
    assert found["needed"].tolist() == [1, 1] and found["moved"].tolist() == [1, 1]


def test_spectra_are_those_of_the_trained_matrices_less_the_initial_ones():
    examples, seeds = _examples(), range(2)
    nets = [models.seeded(seed, models.mlp, INPUTS, WIDTH, CLASSES) for seed in seeds]
    options = {"learning_rates": [0.1, 0.2], "steps": 12, "batch_size": 20, "evaluate_every": 4, **DESCENT}
    found = growth.update_spectra(nets, examples, examples, leading=LEADING, **options)
    trained = train(nets, examples, **options).models
    name = nets[0].penultimate
    updates = [
        after.get_submodule(name).weight - before.get_submodule(name).weight
        for before, after in zip(nets, trained, strict=True)
    ]
    values = torch.linalg.svdvals(torch.stack(updates).detach().double())
    np.testing.assert_allclose(found["values"][:, -1], values[:, : 2 * LEADING], rtol=1e-5, atol=1e-9)
    energies = (values[:, :LEADING] ** 2).sum(1) / (values**2).sum(1)
    np.testing.assert_allclose(found["end_energy"], energies, rtol=1e-9)
    np.testing.assert_allclose(found["energy"][:, -1], energies, rtol=1e-9)
    assert found["at"].tolist() == [0, 4, 8, 12] and np.isnan(found["energy"][:, 0]).all()
    assert (found["values"][:, 0] == 0).all() and (found["accuracy"] > 0.3).all()


def test_the_end_of_a_known_spectrum():
    values = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]]).double()
    end = growth.at_the_end(values, leading=2)
    assert end["end_energy"].tolist() == pytest.approx([10 / 12, 2 / 5])
    assert end["end_half_energy"].tolist() == pytest.approx([9 / 12, 1 / 5])
    assert end["end_nuclear"].tolist() == pytest.approx([4 / 6, 2 / 5])
    assert end["needed"].tolist() == [4, 5] and end["moved"].tolist() == [4, 5]
    np.testing.assert_allclose((end["spectrum"] ** 2).sum(1), 1)


def test_a_gaussian_matrix_spreads_its_energy():
    """Its values follow Marchenko and Pastur: of a square one the top fifth hold about half of the energy."""
    share = spectra.leading_share(growth.gaussian_values((4, 100, 100)), 20)
    assert (share > 0.45).all() and (share < 0.58).all()


def test_linear_networks_start_orthogonal_and_without_biases():
    net = growth.linear_network(models.mlp(INPUTS, WIDTH, CLASSES, 2, "identity"), 0.4, seed=3).double()
    whole = net(torch.eye(INPUTS, dtype=torch.float64))
    np.testing.assert_allclose(torch.linalg.svdvals(whole).tolist(), [0.4**3] * CLASSES, rtol=1e-6)
    assert [name for name, _ in net.named_parameters() if "bias" in name] == []
    again = growth.linear_network(models.mlp(INPUTS, WIDTH, CLASSES, 2, "identity"), 0.4, seed=3).double()
    assert torch.equal(whole, again(torch.eye(INPUTS, dtype=torch.float64)))


def test_whitened_inputs_have_the_identity_as_second_moment():
    inputs = _examples().inputs
    white = growth.whitened(inputs, 5)
    torch.testing.assert_close(white.mT @ white / len(white), torch.eye(5, dtype=torch.float64))
    projected = white @ torch.linalg.lstsq(white, inputs.double()).solution
    kept = torch.linalg.svdvals(inputs.double())[:5]
    torch.testing.assert_close(torch.linalg.svdvals(projected)[:5], kept)
    with pytest.raises(ValueError, match="components is 15, expected 1 to the 14"):
        growth.whitened(inputs, 15)


def test_random_labels_keep_the_counts_of_the_classes():
    examples = _examples()
    dealt = growth.with_random_labels(examples, seed=1)
    assert torch.equal(dealt.targets.bincount(), examples.targets.bincount())
    assert (dealt.targets != examples.targets).float().mean() > 0.3
    assert dealt.inputs is examples.inputs


def test_images_are_taken_evenly_and_held_out_ones_do_not_train(monkeypatch):
    pixels = torch.arange(24, dtype=torch.uint8).view(12, 1, 1, 2)
    part = Images(pixels, torch.arange(12))
    data = ImageData("digits", part, part.take(torch.tensor([0])), ("0",), torch.zeros(1), torch.ones(1), {})
    monkeypatch.setattr(growth, "load_images", lambda name: data)
    found = growth.image_examples("digits", rows=6, held_out=2, flat=True)
    used = torch.cat([found["train"].targets, found["validation"].targets])
    assert sorted(used.tolist()) == [0, 2, 4, 6, 8, 10] and len(found["validation"]) == 2
    assert found["test"].inputs.shape == (1, 2) and len(growth.image_examples("digits")["train"]) == 12
    assert growth.image_examples("digits")["train"].inputs.shape == (12, 1, 1, 2)
    with pytest.raises(ValueError, match="rows is 13, expected 0 for all"):
        growth.image_examples("digits", rows=13)


def test_controls_are_compared_start_by_start():
    ends = [{"end_energy": np.array(pair)} for pair in ([0.9, 0.8], [0.7, 0.7], [0.5, 0.1], [0.95, 0.6])]
    found = growth.compare_controls(ends[0], ends[1], ends[2], ends[3:])
    assert found["adam_below"].tolist() == pytest.approx([0.2, 0.1])
    assert found["random_below"].tolist() == pytest.approx([0.4, 0.7])
    assert found["widths_least"].tolist() == [0.9, 0.6] and found["random/end_energy"].tolist() == [0.5, 0.1]


# rates


def _study(losses):
    def study(nets, *, learning_rates, seed, **_):
        found = np.array([losses[rate] + 0.1 * s for rate, s in zip(learning_rates, seed, strict=True)])
        return {"validation_loss": found, "name": np.array([net.name for net in nets]), "at": np.arange(3)}

    return study


def _named(seed):
    net = torch.nn.Linear(1, 1)
    net.name = f"net {seed}"
    return net


@pytest.mark.parametrize(
    ("losses", "rates", "best"),
    [
        ({0.01: 3, 0.1: 1, 1.0: 2}, [0.01, 0.1, 1.0], 0.1),
        ({0.003: 2, 0.01: 1, 0.1: np.nan, 1.0: np.inf}, [0.01, 0.1, 1.0], 0.01),  # the grid grows below
        ({0.01: 4, 0.03: 3, 0.1: 2, 0.3: 1, 1.0: 5}, [0.01, 0.03], 0.3),  # and above, one rate at a time
        ({0.003: 4, 0.01: np.nan, 0.03: np.nan, 0.001: 5}, [0.01, 0.03], 0.003),  # all of the first diverge
    ],
)
def test_the_rate_that_validates_best_is_kept_with_all_its_seeds(losses, rates, best):
    found = at_best_rate(_study(losses), _named, [5, 7], rates, kept=("validation_loss",))
    assert found["best_rate"].tolist() == [best] and found["best_is_inside"].tolist() == [True]
    assert found["name"].tolist() == ["net 5", "net 7"] and found["at"].tolist() == [0, 1, 2]
    assert found["rates"].tolist() == sorted(losses)
    wanted = [[losses[rate] + 0.5, losses[rate] + 0.7] for rate in sorted(losses)]
    np.testing.assert_allclose(found["validation_loss_by_rate"], wanted)
    np.testing.assert_allclose(found["validation_loss"], np.array([0.5, 0.7]) + losses[best])


def test_a_single_rate_is_taken_as_it_is():
    found = at_best_rate(_study({0.1: 1.0}), _named, [5, 6, 7], [0.1])
    assert found["rates"].tolist() == [0.1] and not found["best_is_inside"][0]
    assert len(found["name"]) == 3 and found["at"].tolist() == [0, 1, 2]  # as many records as networks


def test_rates_that_do_not_ascend_or_all_diverge_are_refused():
    with pytest.raises(ValueError, match=r"rates are \[0.1, 0.01\], expected"):
        at_best_rate(_study({}), _named, [0], [0.1, 0.01])
    with pytest.raises(ValueError, match="diverge"):
        at_best_rate(_study({0.1: np.inf}), _named, [0], [0.1])


def test_a_seed_goes_the_same_way_at_its_rate_whatever_the_other_rates():
    examples = _examples()
    options = {"train_set": examples, "validation_set": examples, "leading": 2, "steps": 10, "batch_size": 20}

    def make(seed):
        return models.seeded(seed, models.mlp, INPUTS, WIDTH, CLASSES).double()

    many = at_best_rate(growth.update_spectra, make, [3, 4], [1e-4, 0.2, 1e4], **options, **DESCENT)
    alone = at_best_rate(growth.update_spectra, make, [3, 4], [0.2], **options, **DESCENT)
    assert many["best_rate"].tolist() == [0.2] and len(many["rates"]) == 3
    np.testing.assert_allclose(many["values"], alone["values"], rtol=1e-6, atol=1e-9)
