"""Protocols of fine-tuning experiments: methods on few examples, early subspaces, rates compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from text_helpers import save_bert

import compressible as cd
from compressible.data.pretrained import load_encoder
from compressible.experiments import early_subspaces, few_shot, rates_compared

RATES = few_shot.Rates(1e-4, 1e-3, 1e-2, 2e-3)


@dataclass
class History:
    """What the protocols read of a RunHistory."""

    losses: np.ndarray
    scores: dict[int, float]
    run: SimpleNamespace = field(default_factory=SimpleNamespace)
    seconds: float = 2.0
    shared: int = 4
    watched: dict = field(default_factory=dict)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_encoder(str(save_bert(tmp_path_factory.mktemp("bert"))), 1, "clean", 0)[0]


# few-shot


def test_methods_are_started_and_paced_as_they_are_called(encoder):
    chosen = few_shot.methods(encoder, ["value"], "authors", 4, 1e-3, RATES)
    assert tuple(chosen) == few_shot.METHODS
    configs = {name: way.config for name, way in chosen.items()}
    kinds = [peft.LoraConfig] * 4 + [cd.DeepLoraConfig] * 4
    assert [type(configs[name]) for name in few_shot.METHODS] == kinds
    assert [chosen[name].start for name in (*few_shot.STARTS, "control", "full")] == [
        cd.paper_lora_start, few_shot.standard_start, None, few_shot.standard_start, None,
    ]  # fmt: skip
    assert [way.rate for way in chosen.values()] == [1e-4, 1e-4, 1e-4, 1e-3, 1e-4, 1e-4, 1e-2, 2e-3]
    assert [configs[name].lr_ratio for name in ("full", "compressed", "slower")] == pytest.approx([1, 0.01, 0.05])
    assert configs["compressed"].variant == configs["slower"].variant == "compressed"
    for config in configs.values():
        assert config.modules_to_save is None and "classifier" in config.exclude_modules


def test_the_standard_start_of_an_embedding_is_that_of_a_linear_layer(encoder):
    way = few_shot.methods(encoder, ["all-dense"], "clean", 4, 1e-3, RATES)["standard"]
    model = peft.get_peft_model(copy.deepcopy(encoder), copy.deepcopy(way.config))
    layer = model.get_base_model().bert.embeddings.word_embeddings
    assert layer.lora_embedding_B["default"].any() and not layer.lora_embedding_A["default"].any()
    way.start(model, torch.Generator().manual_seed(0))
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    assert not b.any() and 0.9 < a.abs().max() * a.shape[1] ** 0.5 <= 1


def test_all_dense_adapts_the_word_embeddings_and_the_pooler_too(encoder):
    few = few_shot.methods(encoder, ["value"], "clean", 4, 1e-3, RATES)["thin"].config
    all_of_them = few_shot.methods(encoder, ["all-dense"], "clean", 4, 1e-3, RATES)["thin"].config
    models = [peft.get_peft_model(copy.deepcopy(encoder), copy.deepcopy(each)) for each in (few, all_of_them)]
    adapted = [set(model.base_model.targeted_module_names) for model in models]
    words, pooler = "bert.embeddings.word_embeddings", "bert.pooler.dense"
    assert len(adapted[0]) == 2 and adapted[0] < adapted[1] and {words, pooler} <= adapted[1]
    assert not any("position" in name or "classifier" in name for name in adapted[1])
    assert all_of_them.modules_to_save == ["classifier"]


def test_runs_of_a_seed_share_their_subset_and_heads_take_the_outer_rate(encoder):
    chosen = few_shot.methods(encoder, ["value"], "clean", 4, 1e-3, RATES)
    task = SimpleNamespace(subset=lambda size, seed: torch.arange(size) + 100 * seed)
    runs = few_shot.planned_runs(chosen, task, [2, 3], range(5, 7))
    assert len(runs) == 8 * 2 * 2
    assert [(len(run.subset), run.seed) for run in runs[:4]] == [(2, 5), (2, 6), (3, 5), (3, 6)]
    assert all(run.subset[0] == 100 * run.seed for run in runs)
    heads = [run.head_lr for run in runs[::4]]
    np.testing.assert_allclose(heads, [1e-4, 1e-4, 1e-4, 1e-3, *[1e-4] * 4], rtol=1e-12)


def test_scores_are_by_method_size_seed_and_mark_and_gains_by_seed():
    sizes, seeds = [16, 64], 3
    values = np.arange(8 * 2 * 3, dtype=float)  # by method, size and seed
    histories = [History(np.full(5, value), {2: 0.0, 5: value}) for value in values]
    out = few_shot.outcome(histories, sizes, seeds)
    assert out["scores"].shape == (8, 2, 3, 2) and out["losses"].shape == (8, 2, 3, 5)
    np.testing.assert_array_equal(out["scores"][..., -1].ravel(), values)
    np.testing.assert_array_equal(out["full - paper, n = 64"], [24, 24, 24])  # four methods of six values before
    np.testing.assert_array_equal(out["slower - full, mean"], [18, 18, 18])
    np.testing.assert_array_equal(out["standard"], [7, 10])
    np.testing.assert_array_equal(out["pass seconds"] / out["pass shared"], [0.5] * 8)
    assert "full - full, mean" not in out and (out["gain shrinks"] == 0).all()


def test_a_gain_shrinks_by_the_first_less_the_second():
    scores = {name: np.zeros((3, 2)) for name in few_shot.METHODS}
    scores["full"] = np.array([[0.5, 0.4], [0.2, 0.1], [9.0, 9.0]])
    np.testing.assert_allclose(few_shot.gains(scores, [1, 2, 3])["gain shrinks"], [0.3, 0.3])


# early subspaces


def test_medians_at_a_quarter_are_over_the_chosen_and_over_all():
    angles = np.zeros((3, 4, 2))
    angles[0, :, 0] = [0.6, 0.9, 0.5, 0.1]  # at the early snapshot: two exceed
    angles[1] = [[0.8, 0.2], [0.6, 0.4], [1.0, 1.0], [0.3, 0.1]]
    share = np.array([[0.0] * 4, [0.1, 0.3, 0.5, 0.7], [1.0] * 4])
    found = early_subspaces.at_a_quarter(angles, share, 0, 1)
    assert found["chosen"] == 2
    names = ("chosen_cosine", "mean_cosine", "smallest_cosine", "captured")
    np.testing.assert_allclose([found[name] for name in names], [0.7, 0.5, 0.3, 0.4])
    assert np.isnan(early_subspaces.at_a_quarter(0 * angles, share, 0, 1)["chosen_cosine"])


def test_a_run_ends_in_the_subspace_that_it_ends_in():
    draw = np.random.default_rng(0)
    frames = [torch.linalg.qr(torch.from_numpy(draw.normal(size=(6, 3))))[0] for _ in range(2)]
    spectra = [SimpleNamespace(layers=["one"], values=np.array([[3.0, 1.0, 0.02]]), outputs=[f], inputs=[f])
               for f in frames]  # fmt: skip
    watched = {0: spectra[0], 1: spectra[0], 2: spectra[1], 8: spectra[1]}
    losses = np.linspace(2, 1, 8)
    found = early_subspaces.outcome([History(losses, {8: 0.5}, watched=watched)] * 2, 2, 8, 1)
    assert found["layers"] == ["one"] and found["outputs/cosines"].shape == (2, 4, 1, 2)
    np.testing.assert_allclose(found["outputs/cosines"][:, 2:], 1)
    assert (found["inputs/captured"][:, :2] < 0.99).all()
    assert found["significant"].tolist() == [2, 2] and found["final_score"].tolist() == [0.5, 0.5]
    smooth = losses[0]
    for loss in losses[1:]:
        smooth += 0.1 * (loss - smooth)
    np.testing.assert_allclose(found["smooth"][:, -1], smooth)
    assert (found["loss_ratio"] < 1).all()


def test_full_width_trains_the_head_only_in_the_clean_protocol(encoder):
    configs = [early_subspaces.full_width(encoder, ["query"], protocol, 3, 1e-3) for protocol in ("authors", "clean")]
    assert [config.modules_to_save for config in configs] == [None, ["classifier"]]
    assert all(config.variant == "full" and config.exclude_modules == {"classifier"} for config in configs)


# rates compared


def test_runs_are_labelled_by_method_and_rate():
    config = cd.DeepLoraConfig()
    runs = rates_compared.planned_runs({"A": (config, [1e-2, 3e-3]), "B": (config, [1.0])}, range(2), 1e-3)
    assert [(run.label, run.lr, run.seed) for run in runs] == [
        ("A, 0.01", 1e-2, 0), ("A, 0.01", 1e-2, 1), ("A, 0.003", 3e-3, 0), ("A, 0.003", 3e-3, 1), ("B, 1", 1, 0),
        ("B, 1", 1, 1),
    ]  # fmt: skip
    assert {run.head_lr for run in runs} == {1e-3}


def test_the_best_rates_are_compared_seed_by_seed():
    ends = {"Deep LoRA, 1": (0.5, 0.1), "LoRA, 1": (0.2, 0.2), "LoRA, 2": (0.3, 0.4)}
    histories = [
        History(np.ones(3), {0: 0.0, 3: end}, SimpleNamespace(label=label))
        for label, each in ends.items()
        for end in each
    ]
    found = rates_compared.curves(histories)
    assert found["LoRA, 2/losses"].shape == (2, 3) and found["LoRA, 2/pearson"].tolist() == [[0, 0.3], [0, 0.4]]
    np.testing.assert_allclose(rates_compared.best_minus_best(found, "Deep LoRA", "LoRA"), [0.2, -0.3])


def test_a_rate_at_which_a_seed_diverged_is_not_the_best_whatever_the_order():
    lost, whole = np.array([[0.9], [np.nan]]), np.array([[0.5], [0.4]])
    other = {"LoRA, 1/pearson": np.zeros((2, 1))}
    for first, second in ((lost, whole), (whole, lost)):
        found = other | {"Deep LoRA, 1/pearson": first, "Deep LoRA, 2/pearson": second}
        np.testing.assert_allclose(rates_compared.best_minus_best(found, "Deep LoRA", "LoRA"), [0.5, 0.4])


def test_merging_and_peft_keep_the_logits(encoder):
    config = cd.DeepLoraConfig(r=4, variant="thin", init_scale=0.3, task_type="SEQ_CLS")
    model = peft.get_peft_model(copy.deepcopy(encoder), config)
    tokens = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    before = encoder(**tokens).logits
    found = rates_compared.round_trip(model.eval(), encoder, tokens)
    assert found["merged"] < 1e-5 and found["loaded"] < 1e-5
    assert (model(**tokens).logits - before).abs().max() > 1e-4  # there was something to keep


def test_rates_are_chosen_on_the_tuning_rows_and_the_grid_grows(monkeypatch):
    best, asked = {"A": 3e-2, "B": 1e-3}, []

    def trained(base, runs, task, steps, evaluate_at, keep_factors, batch_size):
        asked.append([(run.config, run.lr, run.seed) for run in runs])
        scores = [1 - np.log10(run.lr / best[run.config]) ** 2 for run in runs]
        return [
            History(np.ones(3), {steps: np.nan if run.lr > 0.9 else s}, run)
            for run, s in zip(runs, scores, strict=True)
        ]

    monkeypatch.setattr(rates_compared, "fine_tune", trained)
    options = {"most": 6, "head_lr": 1e-3, "steps": 3, "batch_size": 2}
    methods, found = rates_compared.tuned(None, {"A": "A", "B": "B"}, None, [7, 8], [1e-3, 3e-3, 1e-2], **options)
    assert methods == {"A": ("A", [3e-2]), "B": ("B", [1e-3])} and found["rates_inside"].tolist() == [True, True]
    assert found["A/rates"].tolist() == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1] and found["B/rates"][0] == 3e-4
    assert len(asked[0]) == 12 and {seed for _, _, seed in asked[0]} == {7, 8}
    np.testing.assert_allclose(found["A/rate_scores"][3], 1)


def test_losses_in_windows_are_means_at_their_middles():
    at, means = rates_compared.in_windows(np.arange(14.0)[None].repeat(2, 0), 4)  # windows of three, two left over
    assert at.tolist() == [1.5, 4.5, 7.5, 10.5] and means.tolist() == [[1, 4, 7, 10]] * 2
    at, means = rates_compared.in_windows(np.arange(3.0)[None])
    assert at.tolist() == [0.5, 1.5, 2.5] and means.tolist() == [[0, 1, 2]]
