"""Variants of a network: what they share, how rates are chosen, what is timed, what the comparisons come to."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compressible.data.images import ImageData, Images
from compressible.experiments import network_variants as nv
from compressible.experiments import variant_costs as costs
from compressible.networks import models
from compressible.networks.layers import weight_matrix
from compressible.networks.training import Examples

WIDTH, CLASSES, INPUTS = 12, 3, 5
BLOCK: Any = {"layers": ("body.hidden2",)}
VARIANTS = {
    "plain": nv.Variant(),
    "deep": nv.Variant("deep", **BLOCK),
    "random": nv.Variant("compressed", width=4, **BLOCK),
    "gradient": nv.Variant("compressed", width=4, start="gradient", **BLOCK),
    "successor": nv.Variant("compressed", width=4, start="weights_and_gradient", **BLOCK),
}


def blobs(seed: int, count: int = 240) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.eye(INPUTS)[:CLASSES]
    labels = torch.arange(count) % CLASSES
    return Examples(centres[labels] + torch.randn(count, INPUTS, generator=generator), labels)


def scrambled(examples: Examples) -> Examples:
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(9))
    return Examples(examples.inputs, examples.targets[order])


@pytest.fixture
def case() -> nv.Comparison:
    parts = {part: blobs(seed) for seed, part in enumerate(("training", "test", "tuning", "validation"))}
    plan = {"steps": 40, "batch_size": 24, "evaluate_every": 4, "device": "cpu"}
    return nv.Comparison(partial(models.mlp, INPUTS, WIDTH, CLASSES), VARIANTS, **parts, plan=plan, start_batch=60)


def outside(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if "hidden2" not in name}


def test_variants_of_a_seed_share_all_that_is_not_replaced(case: nv.Comparison) -> None:
    plain, *others = (outside(case.build(name, 3)) for name in VARIANTS)
    other_seed = outside(case.build("plain", 4))
    for found in others:
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert not torch.equal(plain["body.input.weight"], other_seed["body.input.weight"])


def test_building_leaves_the_global_generator_alone(case: nv.Comparison) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    case.build("successor", 1)
    assert torch.equal(torch.rand(3), expected)


def test_a_gradient_start_steps_down_the_loss_of_tuning_examples(case: nv.Comparison) -> None:
    plain, small = case.build("plain", 0), case.build("gradient", 0)
    rows = torch.randperm(len(case.tuning), generator=torch.Generator().manual_seed(0))[: case.start_batch]
    loss = functional.cross_entropy(plain(case.tuning.inputs[rows]), case.tuning.targets[rows])
    (gradient,) = torch.autograd.grad(loss, plain.get_submodule("body.hidden2").weight)
    left, _, right = torch.linalg.svd(-gradient.double())
    expected = 0.5**3 * left[:, :4] @ right[:4]
    product = weight_matrix(small.get_submodule("body.hidden2")).double()
    assert torch.allclose(product, expected, atol=1e-5)


def test_the_rate_is_chosen_on_validation_examples(case: nv.Comparison) -> None:
    # Labels at random in training and test would make any rate as good as another, had they a say.
    blind = replace(case, training=scrambled(case.training), test=scrambled(case.test)).only("plain", "random")
    found = nv.tune(blind, [1e-7, 0.02, 1e4], [7, 8])
    for name in ("plain", "random"):
        assert found[f"{name}/own_rate"] == [0.02]
        assert found[f"{name}/inside"] == [True]
        assert found[f"{name}/tuning"][1] > 0.75 > found[f"{name}/tuning"][0]
        assert found[f"{name}/rates"].tolist() == [1e-7, 0.02, 1e4]


def with_accuracies(case: nv.Comparison, accuracy_of: Any) -> tuple[nv.Comparison, list[list[float]]]:
    """The comparison whose trainings come to what accuracy_of(rate, seed) says, NaN for one that diverges."""
    calls: list[list[float]] = []

    class Told(nv.Comparison):
        def train(self, name: str, seeds: Any, rates: Any, built: Any = None, **changes: Any) -> Any:
            calls.append(list(rates))
            ends = np.array([accuracy_of(rate, seed) for rate, seed in zip(rates, seeds, strict=True)])
            curves = np.nan_to_num(ends, nan=0.33)[:, None].repeat(21, 1)  # a diverged network guesses
            return SimpleNamespace(accuracy=curves, diverged=np.isnan(ends))

    return Told(**{part.name: getattr(case.only("plain"), part.name) for part in fields(case)}), calls


def test_a_grid_grows_until_its_best_rate_lies_inside_it(case: nv.Comparison) -> None:
    told, calls = with_accuracies(case, lambda rate, seed: 0.9 - abs(np.log10(rate / 0.1)) / 10 + seed / 1000)
    found = nv.tune(told, [1e-3, 1e-2], [7, 8])
    assert calls == [[1e-3, 1e-3, 1e-2, 1e-2], [0.03, 0.03], [0.1, 0.1], [0.3, 0.3]]
    assert found["plain/rates"].tolist() == [1e-3, 1e-2, 0.03, 0.1, 0.3]
    assert found["plain/own_rate"] == [0.1] and found["plain/inside"] == [True]
    assert found["plain/tuning"].shape == (5,) and found["plain/tuning"][3] == pytest.approx(0.9075)


def test_a_best_rate_at_an_end_of_the_grid_is_told(case: nv.Comparison) -> None:
    found = nv.tune(with_accuracies(case, lambda rate, _: rate)[0], [1e-7, 1e-6], [7])
    assert found["plain/rates"].tolist() == [1e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4]
    assert found["plain/own_rate"] == [1e-4] and found["plain/inside"] == [False]


@pytest.mark.parametrize("failed", [1 / 3, np.nan])
def test_a_rate_at_which_one_of_three_seeds_fails_loses(case: nv.Comparison, failed: float) -> None:
    told, _ = with_accuracies(case, lambda rate, seed: {1e-3: 0.6, 1e-2: 0.8, 0.1: failed if seed == 9 else 0.95}[rate])
    found = nv.tune(told, [1e-3, 1e-2, 0.1], [7, 8, 9])
    assert found["plain/own_rate"] == [1e-2]
    assert found["plain/tuning"][2] == pytest.approx((1.9 + np.nan_to_num(failed)) / 3)


def test_a_single_rate_is_taken_as_it_is(case: nv.Comparison) -> None:
    found = nv.tune(case.only("plain"), [0.02], [7])
    assert found["plain/rates"].tolist() == [0.02] == found["plain/own_rate"].tolist()
    assert found["plain/tuning"][0] > 0.75 and found["plain/inside"] == [False]


@pytest.mark.parametrize("rates", [[0.1, 0.01], [0.01, 0.01], [-1.0, 0.1]])
def test_rates_must_ascend(case: nv.Comparison, rates: list[float]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        nv.tune(case, rates, [7])


def test_learning_at_two_rates_in_one_stack_equals_learning_at_each(case: nv.Comparison) -> None:
    some, seeds = case.only("plain", "random"), [0, 1, 2]
    both = nv.learn(some, seeds, 0.003, {"plain": 0.01, "random": 0.003})
    alone = nv.learn(some.only("plain"), seeds, 0.01)
    assert np.allclose(both["plain/own/loss"], alone["plain/shared/loss"], rtol=1e-4)
    assert not np.allclose(both["plain/own/loss"], both["plain/shared/loss"], rtol=1e-2)
    assert np.array_equal(both["random/own/accuracy"], both["random/shared/accuracy"])
    assert both["plain/shared/accuracy"].shape == (3, 11)
    assert both["at"].tolist() == list(range(0, 41, 4))
    ends = both["plain/own/accuracy"][:, -1:].mean(1)
    assert np.allclose(both["plain/own/end"], ends)


def test_seeds_differ_and_variants_of_a_seed_have_its_batches(case: nv.Comparison) -> None:
    twins = replace(case, variants={"plain": nv.Variant(), "twin": nv.Variant()})
    found = nv.learn(twins, [0, 1], 0.01)
    assert np.array_equal(found["plain/shared/loss"], found["twin/shared/loss"])
    assert not np.allclose(found["plain/shared/loss"][0], found["plain/shared/loss"][1], rtol=1e-3)


def test_the_block_has_the_parameters_that_p2_counts(case: nv.Comparison) -> None:
    found = nv.learn(case, [0], 0.01, steps=1, evaluate_every=1)
    count = {name: int(found[f"{name}/parameters"][0]) for name in VARIANTS}
    assert count["deep"] - count["plain"] == 2 * WIDTH**2
    for name in ("random", "gradient", "successor"):
        assert count["plain"] - count[name] == WIDTH**2 - (2 * 4 * WIDTH + 4**2)


def test_the_outer_ratio_slows_the_outer_factors(case: nv.Comparison) -> None:
    slow = replace(case, variants={"slow": replace(VARIANTS["random"], outer_ratio=1e-6)})
    history = slow.train("slow", [0], [0.01])
    before, after = (
        list(model.get_submodule("body.hidden2").factors) for model in (slow.build("slow", 0), history.models[0])
    )
    moved = [(new - old).abs().max().item() for old, new in zip(before, after, strict=True)]
    assert moved[0] < 1e-5 and moved[2] < 1e-5 and moved[1] > 1e-2


def test_exploring_an_option_is_training_with_it(case: nv.Comparison) -> None:
    some = case.only("plain")
    found = nv.explore(some, "batch_size", [12, 48], [0, 1], 0.01)
    sets = {"train_set": case.tuning, "test_set": case.validation, "evaluate_every": 2}
    history = some.train("plain", [0, 1], [0.01, 0.01], **sets, batch_size=48)
    assert found["plain/batch_size"].shape == (2, 2)
    assert np.allclose(found["plain/batch_size"][:, 1], nv.end(history.accuracy))


def test_an_end_is_the_mean_of_the_last_tenth() -> None:
    curves = np.arange(40.0).reshape(2, 20)
    assert nv.end(curves).tolist() == [18.5, 38.5]
    assert nv.end(curves[:, :3]).tolist() == [2.0, 22.0]


def test_arrivals_lie_between_records() -> None:
    curves = np.array([[0.0, 0.5, 1.0], [0.0, 0.5, 0.6], [0.9, 0.9, 0.9]])
    found = costs.arrival(curves, np.array([0.75, 0.7, 0.8]), np.array([0.0, 10.0, 20.0]))
    assert np.allclose(found, [15.0, np.nan, 0.0], equal_nan=True)


def test_seconds_to_the_same_accuracy_are_iterations_times_seconds_of_a_step() -> None:
    at, slope = np.arange(0.0, 101.0, 10.0), np.linspace(0, 1, 11)
    found: dict[str, np.ndarray] = {"at": at}
    for name, curve in (("fast", np.minimum(2 * slope, 0.8)), ("slow", slope)):
        found |= {f"{name}/own/accuracy": np.tile(curve, (4, 1)), f"{name}/own/end": np.tile(curve[-1], 4)}
    clock = {"fast/step_seconds": np.array([1.0, 1.1, 0.9]), "slow/step_seconds": np.array([4.0, 4.4, 2.0])}
    ratios = costs.compare_seconds(found, clock, "fast", "slow", margin=0.2)
    assert np.allclose(ratios["fast / slow/step"], [0.25, 0.25, 0.45])
    assert np.allclose(ratios["fast / slow/own/iterations"], [0.5] * 4)  # to .6 after 30 and 60 iterations
    assert np.allclose(ratios["fast / slow/own/seconds"], [0.125, 0.125, 0.225, 0.125])  # a seed, a round


def test_ends_are_compared_by_seed() -> None:
    found = {f"{name}/{kind}/end": np.array([value, 0.5]) for name, value in (("a", 0.7), ("b", 0.6))
             for kind in ("shared", "own")}  # fmt: skip
    differences = nv.compare_ends(found, ("a",), ("a", "b"))
    assert set(differences) == {"a - b/shared", "a - b/own"}
    assert np.allclose(differences["a - b/own"], [0.1, 0.0])


def test_a_step_is_timed_and_its_operations_counted(case: nv.Comparison) -> None:
    clock = costs.time_alone(case.only("plain", "random"), repeats=3, seconds=0.01)
    batch, matrices = 24, {"plain": [WIDTH**2], "random": [4 * WIDTH, 4 * 4, 4 * WIDTH]}
    for name, block in matrices.items():
        seconds = clock[f"{name}/step_seconds"]
        assert seconds.shape == (3,) and (seconds > 0).all()
        # Three products a matrix (output, its two gradients), but for the first, whose input needs none.
        rest = 3 * (WIDTH**2 + CLASSES * WIDTH) + 2 * INPUTS * WIDTH
        assert clock[f"{name}/operations"] == [2 * batch * (rest + 3 * sum(block))]
        parameters = nv.learn(case.only(name), [0], 0.01, steps=1, evaluate_every=1)[f"{name}/parameters"]
        assert clock[f"{name}/state_bytes"] == 16 * parameters


def test_steps_are_timed_on_the_cpu_and_on_what_else_there_is() -> None:
    assert costs.places("cpu") == ["cpu"]


def test_images_that_choose_rates_are_no_images_that_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (60, 1, 4, 4), generator=generator, dtype=torch.uint8)
    train, test = (Images(part, torch.arange(len(part)) % 10) for part in (pixels[:40], pixels[40:]))
    mean, std = (train.pixels.double() / 255).mean().float()[None], (train.pixels.double() / 255).std().float()[None]
    data = ImageData("noise", train, test, tuple("0123456789"), mean, std, {})
    monkeypatch.setattr(nv, "load_images", lambda name: data)
    parts = nv.image_examples("noise", 10, seed=1, train_rows=30, test_rows=8)
    assert [len(parts[part]) for part in ("training", "test", "tuning", "validation")] == [30, 8, 20, 10]
    rows = {part: {tuple(row) for row in parts[part].inputs.flatten(1).tolist()} for part in parts}
    assert rows["tuning"] | rows["validation"] == rows["training"]
    assert not rows["tuning"] & rows["validation"] and not rows["test"] & rows["training"]
    assert abs(parts["training"].inputs.mean()) < 0.1 and abs(parts["training"].inputs.std() - 1) < 0.1


def test_widths_are_timed_on_the_device_and_the_smaller_ones_on_the_cpu(
    case: nv.Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(width: int) -> nv.Comparison:
        return replace(case.only("plain"), make=partial(models.mlp, INPUTS, width, CLASSES))

    clock = costs.time_widths(of, [6, 24], 12, "cpu", repeats=2, seconds=0.001)
    assert {key.rpartition("/plain/")[0] for key in clock} == {"cpu/6", "cpu/24"}
    assert clock["cpu/24/plain/operations"] > clock["cpu/6/plain/operations"]
    monkeypatch.setattr(costs, "places", lambda device: ["cpu", "cuda"])
    monkeypatch.setattr(costs, "time_alone", lambda case, repeats, seconds, device: {"device": device})
    assert set(costs.time_widths(of, [6, 24], 12, "cuda", 2, 0.001)) == {
        f"{p}/device" for p in ("cpu/6", "cuda/6", "cuda/24")
    }
