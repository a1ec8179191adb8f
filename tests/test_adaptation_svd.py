"""P3's Figure 4: the spectrum of a wide adapter's product, in both readings of where the model starts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from text_helpers import rated_task, save_bert

import compressible as cd
from compressible.data.pretrained import load_encoder
from compressible.experiments import adaptation_svd, early_subspaces
from compressible.finetuning.peft_models import base_of
from compressible.recovery.spectra import svd_evolution
from compressible.runtime.chain import product

MATRIX = "layer.1.attention.self.value"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_encoder(str(save_bert(tmp_path_factory.mktemp("bert"))), 1, "authors", 0)[0]


@pytest.fixture(scope="module")
def task() -> cd.Task:
    return rated_task()


def snapshot(step: int, *matrices: torch.Tensor) -> SimpleNamespace:
    layers = [(f"layer.{i}", matrix) for i, matrix in enumerate(matrices)]
    return SimpleNamespace(step=step, runs=[], updates=lambda: iter(layers))


def test_angles_and_values_are_those_of_the_whole_decomposition():
    draw = torch.Generator().manual_seed(0)
    path = torch.randn(2, 4, 12, 12, dtype=torch.float64, generator=draw)  # two runs at four marks
    watch = adaptation_svd.watch_ends(2, {0, 30})
    marks = {step: watch(snapshot(step, path[:, at])) for at, step in enumerate((0, 1, 10, 30))}
    assert ["product" in marks[step][0] for step in marks] == [True, False, False, True]
    histories = [
        SimpleNamespace(watched={step: of[run] for step, of in marks.items()}, losses=np.ones(30), scores={30: 0.5})
        for run in range(2)
    ]
    found, known = adaptation_svd.outcome(histories, 2), svd_evolution(path, 2)
    np.testing.assert_allclose(found["values"], known.values, rtol=1e-6)
    for side in ("right", "left"):
        assert np.isnan(found[side][:, 0]).all()
        np.testing.assert_allclose(found[side][:, 1:], getattr(known, side)[:, 1:], atol=2e-3)  # of float32 near 0
    ends = known.values[:, [0, -1]]
    assert found["moved"].tolist() == ((ends[:, 1] / ends[:, 0] - 1).abs() > 0.05).sum(1).tolist()
    middle = torch.maximum(known.right[:, -1, 2], known.left[:, -1, 2])
    np.testing.assert_allclose(found["middle_angle"], middle, atol=1e-4)
    change = torch.linalg.svdvals(path[:, -1] - path[:, 0]) ** 2
    np.testing.assert_allclose(found["change_share"], change[:, :4].sum(1) / change.sum(1), rtol=1e-5)


def test_a_low_rank_change_of_an_orthogonal_start_moves_that_many_values():
    start = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    change = torch.zeros(20, 20, dtype=torch.float64)
    change[0], change[1] = start[0], -0.5 * start[1]  # one value doubles, one is halved
    watch = adaptation_svd.watch_ends(1, {0, 2})
    path = start, start + 0.1 * change, start + change
    marks = {step: watch(snapshot(step, matrix[None]))[0] for step, matrix in enumerate(path)}
    found = adaptation_svd.outcome([SimpleNamespace(watched=marks, losses=np.ones(2), scores={})], 1)
    assert found["moved"].tolist() == [2]
    assert found["middle_angle"][0] < 1e-3 and found["change_share"][0] == pytest.approx(1)


def test_several_matrices_are_refused():
    with pytest.raises(ValueError, match="2 matrices"):
        adaptation_svd.watch_ends(1, {0})(snapshot(0, torch.eye(4)[None], torch.eye(4)[None]))


def test_a_start_that_is_taken_off_leaves_the_model_as_it_is(encoder, task):
    config = early_subspaces.full_width(encoder, [MATRIX], "authors", 3, 1.0)
    [name] = adaptation_svd.of_peft(encoder, cd.FineTuningRun(config, 1e-3, 0)).chains
    start = adaptation_svd.SharedStart(adaptation_svd.of_peft(encoder, cd.FineTuningRun(config, 1e-3, 0)).chains)
    before = encoder.get_submodule(name).weight.clone()
    base = adaptation_svd.without(encoder, start)
    assert torch.equal(encoder.get_submodule(name).weight, before)
    runs = [cd.FineTuningRun(config, 1e-9, seed, start=start) for seed in (0, 1)]
    for history in cd.fine_tune(base, runs, task, 1, 4, show_progress=False):
        adapted = base_of(history.model()).get_submodule(name)
        whole = adapted.get_base_layer().weight + product(history.chains[name])
        torch.testing.assert_close(whole, before, atol=1e-5, rtol=0)
        torch.testing.assert_close(product(history.chains[name]).mT @ product(history.chains[name]), torch.eye(16))


def test_both_readings_start_at_scale_one_and_differ_in_the_model(encoder, task):
    config = early_subspaces.full_width(encoder, [MATRIX], "authors", 3, 1.0)
    options = {"steps": 4, "batch_size": 4, "watch_at": [0, 1, 4], "evaluate_at": [4], "show_progress": False}
    found = adaptation_svd.both_readings(encoder, task, config, 1e-3, range(2), 2, **options)
    for reading in adaptation_svd.READINGS:
        np.testing.assert_allclose(found[f"{reading}/values"][:, 0], 1, atol=1e-5)
        assert found[f"{reading}/right"].shape == found[f"{reading}/left"].shape == (2, 3, 5)
        assert found[f"{reading}/losses"].shape == (2, 4) and found[f"{reading}/scores"].shape == (2, 1)
    plain = [cd.FineTuningRun(cd.DeepLoraConfig(variant="full", init_scale=1e-6, target_modules=[MATRIX]), 1e-3, seed)
             for seed in range(2)]  # fmt: skip
    unchanged = [history.losses[0] for history in cd.fine_tune(encoder, plain, task, 1, 4, show_progress=False)]
    np.testing.assert_allclose(found["taken off/losses"][:, 0], unchanged, rtol=1e-4)
    assert (np.abs(found["added/losses"][:, 0] - unchanged) > 1e-3).all()
