"""Steps in parts of rows of similar length: runs stay the same, and there are few graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("peft")  # a GPU host may have PyTorch, Triton and pytest alone
from reference_finetune import reference_fine_tune
from test_finetune import assert_equal, bert, config, lora, mixed, task
from test_mpnet_attention import mpnet

import compressible as cd
from compressible.finetuning import padding, stacked_pass
from compressible.finetuning.padding import GRAPHS, Parts, best_ends, few, parts_of
from compressible.finetuning.run import data_order
from compressible.finetuning.stacked_pass import StackedPass

OPTIONS = {"steps": 6, "batch_size": 8, "decay_ratio": 0.1, "evaluate_at": (0, 6)}


@pytest.fixture
def counted(monkeypatch):
    """Numbers of the parts of all steps; as many as can be are taken."""
    monkeypatch.setitem(padding.COST, "cpu", 0)
    seen, original = [], stacked_pass.joined
    monkeypatch.setattr(stacked_pass, "joined", lambda *given: seen.append(len(given[0])) or original(*given))
    return seen


def whole(monkeypatch):
    monkeypatch.setattr(StackedPass, "_parted", lambda stacked: None)


@pytest.mark.parametrize("make", [bert, mpnet])
def test_runs_in_parts_go_as_whole_and_as_the_plain_run_alone(make, counted, monkeypatch):
    runs = mixed() if make is bert else [cd.FineTuningRun(config(each), 1e-3, 1) for each in ("thin", "compressed")]
    found = cd.fine_tune(make(), runs, task(), **OPTIONS)
    assert counted == [3] * len(counted) and len(counted) >= 6
    plain = reference_fine_tune(make(), runs, task(), **OPTIONS)
    whole(monkeypatch)
    for own, other, alone in zip(found, cd.fine_tune(make(), runs, task(), **OPTIONS), plain, strict=True):
        assert_equal(own, other, 1e-9)
        assert_equal(own, alone, 1e-8)


def test_classes_dropped_inputs_full_width_and_subsets_in_parts_go_as_alone(counted):
    given = {"lora_dropout": 0.2, "target_modules": ["query", "dense"]}
    subset = torch.arange(0, 40, 3)
    for chosen in (lora(**given), config("full", target_modules=["query", "word_embeddings"])):
        runs = [cd.FineTuningRun(chosen, rate, seed, subset) for rate in (1e-3, 1e-2) for seed in (0, 4)]
        found = cd.fine_tune(bert(2), runs, task("classification"), **OPTIONS)
        assert set(counted) == {3}
        for own, run in zip(found, runs, strict=True):
            (alone,) = cd.fine_tune(bert(2), [run], task("classification"), **OPTIONS)
            assert_equal(own, alone, 1e-9)


def test_texts_runs_alone_and_rows_without_a_mask_are_whole():
    runs = [cd.FineTuningRun(config(), 1e-3, seed) for seed in (0, 1)]
    unmasked = task()
    del unmasked.train.tokens["attention_mask"]
    for given in ((runs[:1], task()), (runs, unmasked)):
        stacked = StackedPass(bert(), *given, 2, 8)
        stacked.start()
        assert stacked.parts is None and "input_ids" in stacked.batch(0)[0]


def passes(runs=3, steps=200, batch=16, rows=2000):
    draw = torch.Generator().manual_seed(0)
    lengths = (6 + 12 * torch.randn(rows, generator=draw).exp()).long().clamp(max=128)
    chosen = [cd.FineTuningRun(config(), 1e-3, seed) for seed in range(runs)]
    return torch.stack([data_order(run, rows, steps, batch) for run in chosen], 1), lengths


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("runs", [3, 20])
def test_few_lengths_cover_all_rows_and_every_row_is_taken_once(kind, runs):
    order, lengths = passes(runs)
    parts = Parts(order, lengths, kind)
    assert 1 < len(parts.ends) <= 3 and parts.ends[-1] == 16
    assert len(parts.lengths.unique(dim=0)) <= GRAPHS
    assert torch.equal(parts.order.sort(2).values, order.sort(2).values)
    assert torch.equal(order.gather(2, parts.numbers), parts.order)
    own = lengths[parts.order].amax(1)
    for part, end in enumerate(parts.ends):
        assert (own[:, :end].amax(1) <= parts.lengths[:, part]).all()
    sizes = torch.tensor(parts.ends) - torch.tensor([0, *parts.ends[:-1]])
    share = (parts.lengths * sizes).sum().item() / (16 * own[:, -1].sum().item())
    assert share < (0.65 if (kind, runs) != ("cuda", 3) else 0.9)  # of so few tokens many graphs do not pay


def test_lengths_that_become_one_grow_least_and_their_number_is_bounded(monkeypatch):
    monkeypatch.setattr(padding, "GRAPHS", 2)
    lengths = torch.tensor([[32, 128], [32, 96], [32, 128], [64, 32], [32, 96]])
    assert few(lengths, torch.tensor([12, 4]), 0).tolist() == [[32, 128]] * 3 + [[64, 32]] + [[32, 128]]
    assert few(lengths, torch.tensor([12, 4]), 10_000).tolist() == [[64, 128]] * 5
    assert best_ends(torch.tensor([10.0, 10, 10, 90]), 5) == (3, 4)
    assert best_ends(torch.tensor([10.0, 10, 10, 90]), 500) == (4,)


def test_a_batch_holds_the_tokens_of_its_parts_and_the_numbers_of_their_rows(counted):
    runs = [cd.FineTuningRun(config(), 1e-3, seed) for seed in (0, 1)]
    stacked = StackedPass(bert(), runs, task(), 3, 8)
    stacked.start()
    (tokens, labels), (all_tokens, all_labels) = stacked.batch(1), stacked.whole(1)
    seen = {}
    for part, numbers in parts_of(tokens):
        assert part["input_ids"].shape[1] % 8 == 0
        for row, number in enumerate(numbers.tolist()):
            run = row // (len(numbers) // 2)
            own, wide = part["input_ids"][row], all_tokens["input_ids"][8 * run + number]
            assert own.tolist() == wide[: len(own)].tolist() and not wide[len(own) :].any()
            seen[run, number] = True
    assert len(seen) == 16 and sorted(labels.tolist()) == sorted(all_labels.tolist())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_steps_in_parts_are_those_in_one(monkeypatch):
    monkeypatch.setitem(padding.COST, "cuda", 0)
    monkeypatch.setitem(padding.MULTIPLES, "cuda", 8)
    runs = [cd.FineTuningRun(config(each), 1e-3, 1) for each in ("thin", "compressed")]
    found = cd.fine_tune(mpnet().float().cuda(), runs, task(), **OPTIONS)
    whole(monkeypatch)
    for own, other in zip(found, cd.fine_tune(mpnet().float().cuda(), runs, task(), **OPTIONS), strict=True):
        np.testing.assert_allclose(own.losses, other.losses, rtol=1e-3)
