"""P3's Figure 5: how far LoRA's factors move, and LoRA+ against LoRA at a larger rate and at rates of their own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from text_helpers import rated_task, save_bert

import compressible as cd
from compressible.data.pretrained import load_encoder
from compressible.experiments import lora_imbalance


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_encoder(str(save_bert(tmp_path_factory.mktemp("bert"))), 1, "authors", 0)[0]


@pytest.fixture(scope="module")
def task() -> cd.Task:
    return rated_task()


def study(encoder, task, **given) -> lora_imbalance.Study:
    config = lora_imbalance.lora_of(encoder, ["query", "value"], "authors", 2)
    options = {"steps": 6, "batch_size": 4, "show_progress": False}
    known = {"ratio": 16.0, "level": 7.0, "options": options}
    return lora_imbalance.Study(encoder, task, config, **known | given)


def histories(*losses) -> list[SimpleNamespace]:
    return [SimpleNamespace(losses=np.array(each, float)) for each in losses]


def test_steps_to_a_level_are_of_the_smoothed_loss():
    falls, never, lost = [4.0, 0.0, 0.0], [4.0, 4.0, 4.0], [4.0, np.nan, np.nan]
    assert lora_imbalance.steps_to(histories(falls, never, lost), 3.3).tolist()[:2] == [3, np.inf]  # 4, 3.6, 3.24
    assert np.isnan(lora_imbalance.steps_to(histories(lost), 3.3)).all()
    np.testing.assert_allclose(lora_imbalance.smooth(np.array(falls)), [4, 3.6, 3.24])
    assert np.isnan(lora_imbalance.smooth(np.array(lost))[1:]).all()


def test_quotients_of_steps_say_who_arrived():
    one, other = np.array([6, np.inf, 3, np.inf]), np.array([3, 3, np.inf, np.inf])
    np.testing.assert_array_equal(lora_imbalance.quotient(one, other), [2, np.inf, 0, np.nan])


def test_moves_are_taken_over_all_layers():
    factors = np.zeros((1, 3, 2, 4))  # one run, three marks, two layers: |A|, |B|, and how far their entries moved
    factors[0, :, :, 0] = [[3, 4], [3, 4], [6, 8]]
    factors[0, :, :, 1] = [[0, 0], [1, 1], [1, 0.5]]
    factors[0, -1, :, 2:] = [[0.3, 0.1], [0.4, 0.2]]
    found = lora_imbalance.moves(factors)
    assert found["a_change"] == pytest.approx([1.0]) and found["b_grows"].tolist() == [False]
    assert found["move_ratio"] == pytest.approx([np.sqrt((0.09 + 0.16) / (0.01 + 0.04))])


def test_what_is_watched_is_of_the_factors_that_peft_draws(encoder, task):
    lora = study(encoder, task)
    runs = [*lora.runs("LoRA", 1e-2, range(2)), *lora.runs("LoRA+", 1e-2, range(2))]
    watch = lora_imbalance.watch_factors(lora, range(2))
    found = cd.fine_tune(encoder, runs, task, watch_at=[0, 6], watch=watch, **lora.options)
    for history in found:
        begin, end = history.watched[0], history.watched[6]
        assert not begin[:, 1:].any()  # B is zero, and neither has moved
        sizes = [[float(factor.norm()) for factor in chain] for chain in history.chains.values()]
        np.testing.assert_allclose(end[:, :2], sizes, rtol=1e-5)
        rms = [float(chain[1].square().mean().sqrt()) for chain in history.chains.values()]
        np.testing.assert_allclose(end[:, 3], rms, rtol=1e-5)
        assert (end[:, 2] > 0).all()
    lora_b, plus_b = (found[at].watched[6][:, 3].mean() for at in (0, 2))
    assert 4 < plus_b / lora_b < 32  # its B learns 16 times as fast


def test_all_cases_are_trained_and_paired(encoder, task):
    rates = [1e-3, 1e-2, 1e-1]
    found = study(encoder, task).compare(1e-3, rates, range(1000, 1001), range(2), [6], [0, 6])
    assert found["case_rates"][:3] == [1e-3, 1e-3, 1.6e-2]
    for method, own in zip(lora_imbalance.METHODS, found["case_rates"][3:], strict=True):
        scores = dict(zip(found[f"{method}/rates"], found[f"{method}/scores"], strict=True))
        assert own in scores and scores[own] == max(scores.values()) and {*rates} <= {*scores}
    assert found["losses"].shape == (5, 2, 6) and found["scores"].shape == (5, 2, 1)
    assert found["factors"].shape == (5, 2, 2, 4, 4) and found["needed"].shape == (5, 2)
    assert (found["losses"][:, :, 0].std(0) < 1e-5).all()  # a seed has the same start and first batch in every case
    assert found["speedup"].shape == found["speedup_tuned"].shape == found["move_ratio"].shape == (2,)
