"""Random orthogonal matrices, many at once, as they are drawn one after the other; by products, as a GPU takes them."""

from __future__ import annotations

import pytest
import torch
from test_finetune import LINEAR, bert, config

import compressible as cd
from compressible.adapters.config import DeepLoraConfig
from compressible.finetuning.peft_models import adapted_by_peft, base_of, chain_of, tuner_layers
from compressible.finetuning.stacked.starts import drawn_starts
from compressible.runtime import orthogonal_batches
from compressible.runtime.orthogonal_batches import OrthogonalBatches, as_normal, by_products, positive_qr
from compressible.runtime.starting_factors import orthogonal

SHAPES = [(40, 40), (24, 40), (40, 24), (7, 3), (1, 5), (24, 40), (200, 130), (130, 200), (40, 40)]


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def together(shapes, device="cpu", as_a_gpu=False):
    with OrthogonalBatches(torch.device(device)) as batches:
        batches.on_gpu = batches.on_gpu or as_a_gpu
        return batches.draw(shapes, generator())


def alone(shapes):
    own = generator()
    return [orthogonal(*shape, own) for shape in shapes]


@pytest.mark.parametrize("threads", [1, 3])
def test_on_a_cpu_they_are_the_same_to_the_last_bit(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = together(SHAPES)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(found, alone(SHAPES), strict=True))


@pytest.mark.parametrize("room", [1, 2000, 2**26])
def test_by_products_of_uniform_numbers_they_are_the_same_within_rounding(room, monkeypatch):
    monkeypatch.setattr(orthogonal_batches, "TOGETHER", room)
    for one, other in zip(together(SHAPES, as_a_gpu=True), alone(SHAPES), strict=True):
        assert one.dtype is torch.float32 and one.shape == other.shape and one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_torch_makes_normal_numbers_of_uniform_ones_as_supposed():
    assert orthogonal_batches.are_uniform((768, 3072)) and not orthogonal_batches.are_uniform((7, 3))
    uniform = torch.empty(96, 96, dtype=torch.float64).uniform_(generator=generator())
    normal = torch.empty(96, 96, dtype=torch.float64).normal_(generator=generator())
    torch.testing.assert_close(as_normal(uniform), normal, rtol=1e-13, atol=1e-13)


def test_were_torch_to_draw_otherwise_its_normal_numbers_would_be_taken(monkeypatch):
    monkeypatch.setattr(orthogonal_batches, "as_normal", lambda uniform: uniform)
    orthogonal_batches.are_uniform.cache_clear()
    try:
        found = together(SHAPES, as_a_gpu=True)
    finally:
        orthogonal_batches.are_uniform.cache_clear()
    for one, other in zip(found, alone(SHAPES), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e12])
def test_matrices_close_to_singular_are_decomposed_as_well(condition):
    tall = torch.randn(3, 150, 100, dtype=torch.float64, generator=generator())
    u, _, v = torch.linalg.svd(tall[1], full_matrices=False)
    tall[1] = u * torch.logspace(0, -torch.tensor(condition).log10(), 100, dtype=torch.float64) @ v
    found = by_products(tall)
    torch.testing.assert_close(found.mT @ found, torch.eye(100).double().expand(3, -1, -1), rtol=0, atol=1e-11)
    torch.testing.assert_close(found, positive_qr(tall), rtol=0, atol=1e-14 * condition + 1e-12)


@pytest.mark.parametrize("variant", ["thin", "full", "compressed"])
def test_starts_of_a_pass_are_what_peft_gives_each_run(variant):
    chosen = DeepLoraConfig(r=4, variant=variant, target_modules=[*LINEAR, "word_embeddings"], init_weights=False)
    runs = [cd.FineTuningRun(each, 1e-3, seed) for each in (chosen, config("thin")) for seed in (0, 5)]
    for run, start in zip(runs, drawn_starts(bert(), runs), strict=True):
        layers = tuner_layers(base_of(adapted_by_peft(bert(), run.config, run.seed)))
        assert set(layers) == set(start.chains)
        for name, layer in layers.items():
            for one, other in zip(start.chains[name], chain_of(layer), strict=True):
                assert torch.equal(one, other.detach().to(one.dtype))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_they_are_the_same_within_rounding():
    shapes = [*SHAPES, (768, 768), (768, 3072), (3000, 768)]
    for one, other in zip(together(shapes, "cuda"), alone(shapes), strict=True):
        assert one.is_cuda
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=1e-7)
