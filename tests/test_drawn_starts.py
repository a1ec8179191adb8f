"""The starts of a stack's runs, to the last bit those that `get_peft_model` gives each alone, and what they cost."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")  # a GPU host may have PyTorch, Triton and pytest alone
import peft
from test_finetune import LINEAR, bert, config, lora

import compressible as cd
from compressible.experiments import few_shot, rank_robustness
from compressible.finetuning import peft_models
from compressible.finetuning.peft_models import base_of, chain_of, scaling_of, tuner_layers
from compressible.finetuning.stacked import redrawn, starts
from compressible.finetuning.stacked.starts import drawn_starts

EMBEDDED = [*LINEAR, "word_embeddings"]
SEEDS = (0, 7, 3)
CASES = {
    "standard": (lora(target_modules=EMBEDDED), None),
    "gaussian": (lora(init_lora_weights="gaussian", target_modules=EMBEDDED), None),
    "orthogonal": (lora(init_lora_weights="orthogonal"), None),
    "torch's own": (lora(init_lora_weights=False), None),
    "rank-stabilised": (lora(use_rslora=True, lora_alpha=8), None),
    "ranks by name": (lora(rank_pattern={"query": 2}, alpha_pattern={"value": 6}, lora_dropout=0.1), None),
    "paper": (lora(target_modules=EMBEDDED), cd.paper_lora_start),
    "scaled": (lora(lora_alpha=8), rank_robustness.scaled_paper_start),
    "embeddings as linear layers": (lora(target_modules=EMBEDDED), few_shot.standard_start),
    "pissa": (lora(init_lora_weights="pissa"), None),
    "pissa with embeddings": (lora(init_lora_weights="pissa", target_modules=EMBEDDED), None),
    "pissa_niter_4": (lora(init_lora_weights="pissa_niter_4"), None),
    "olora": (lora(init_lora_weights="olora"), None),
    "thin": (config("thin", target_modules=EMBEDDED), None),
    "full": (config("full"), None),
    "compressed": (config("compressed", init_weights=False), None),
}


def model(kind=torch.float32):
    return bert().to(kind)


def runs_of(name, seeds=SEEDS):
    chosen, start = CASES[name]
    return [cd.FineTuningRun(copy.deepcopy(chosen), 1e-3, seed, start=start) for seed in seeds]


def alone(source, run):
    """The run's model by peft itself."""
    torch.manual_seed(run.seed)
    adapted = peft.get_peft_model(copy.deepcopy(source), copy.deepcopy(run.config))
    if run.start is not None:
        run.start(adapted, torch.Generator().manual_seed(run.seed))
    return adapted


def assert_are_alone(source, runs):
    for run, start in zip(runs, drawn_starts(source, runs), strict=True):
        layers = tuner_layers(base_of(alone(source, run)))
        assert list(start.chains) == list(layers)
        assert start.scalings == {name: scaling_of(layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            for one, other in zip(start.chains[name], chain_of(layer), strict=True):
                assert one.dtype is other.dtype and torch.equal(one, other)
            given = source.get_submodule(name).weight
            assert (name in start.taken_off) is not torch.equal(layer.get_base_layer().weight, given)


@pytest.mark.parametrize("name", CASES)
def test_starts_are_those_of_peft_to_the_last_bit(name):
    assert_are_alone(model(), runs_of(name))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_factors_have_the_type_that_peft_gives_them(kind):
    assert_are_alone(model(kind), runs_of("paper") + runs_of("standard"))


@pytest.mark.parametrize("name", ["standard", "paper", "rank-stabilised", "scaled"])
def test_all_seeds_of_a_config_start_in_one_model(name, made):
    drawn_starts(model(), runs_of(name, range(9)))
    assert len(made) == 1


@pytest.mark.parametrize(("name", "expected"), [("pissa", 1), ("olora", 1), ("pissa with embeddings", 3)])
def test_weights_are_decomposed_once_where_that_is_all_of_a_start(name, expected, made):
    drawn_starts(model(), runs_of(name))
    assert len(made) == expected


def test_a_start_that_may_change_more_than_factors_has_a_model_for_every_seed(made):
    seen = []

    def start(adapted, generator):
        seen.append(adapted)
        cd.paper_lora_start(adapted, generator)

    runs = [cd.FineTuningRun(lora(), 1e-3, seed, start=start) for seed in SEEDS]
    assert_are_alone(model(), runs)
    assert len({id(adapted) for adapted in seen[:3]}) == len(made) == 3


def test_were_peft_to_draw_more_than_its_layers_do_every_seed_would_have_a_model(monkeypatch, made):
    def given(*args, **kwargs):
        torch.rand(5)
        return whole(*args, **kwargs)

    whole = peft.get_peft_model
    monkeypatch.setattr(peft, "get_peft_model", given)
    assert_are_alone(model(), runs_of("standard"))
    assert len(made) == 1 + 3


def test_the_callers_random_numbers_and_weights_are_as_before():
    source = model()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn_starts(source, [run for name in ("standard", "paper", "pissa") for run in runs_of(name)])
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


@pytest.fixture
def made(monkeypatch):
    """The models of peft's that `drawn_starts` asks for."""
    kept = []

    def adapted(*args, **kwargs):
        kept.append(peft_models.adapted_by_peft(*args, **kwargs))
        return kept[-1]

    for module in (starts, redrawn):
        monkeypatch.setattr(module, "adapted_by_peft", adapted)
    return kept
