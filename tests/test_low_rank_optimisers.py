"""GaLore against galore-torch, ReLoRA on peft's layers, and P3's Theorem 4, which joins the two."""

from __future__ import annotations

import copy
import doctest
import math

import numpy as np
import peft
import pytest
import reference_galore
import torch
from torch import nn

from compressible.networks.optim import galore, relora
from compressible.networks.optim.galore import GaLoreAdamW, GaLoreSGD

STORED = {name: torch.tensor(value) for name, value in np.load(reference_galore.FILE).items() if name != "source"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# GaLore


@pytest.mark.parametrize("name", reference_galore.CASES)
def test_steps_are_those_of_galore_torch(name, monkeypatch):
    """The committed iterates of galore-torch 1.0; its singular vectors' signs, which LAPACKs may choose, are kept."""
    refreshes = iter(zip(STORED[f"{name}/left"], STORED[f"{name}/right"], strict=True))

    def same_signs(gradient, rank):
        left, right = leading_vectors(gradient, rank)
        theirs_left, theirs_right = next(refreshes)
        signs = (left * theirs_left).sum(0).sign()
        torch.testing.assert_close(left * signs, theirs_left, atol=1e-5, rtol=0)
        torch.testing.assert_close(signs[:, None] * right, theirs_right, atol=1e-5, rtol=0)
        return left * signs, signs[:, None] * right

    leading_vectors = galore.leading_vectors
    monkeypatch.setattr(galore, "leading_vectors", same_signs)
    found = reference_galore.iterates(GaLoreAdamW, name, STORED[f"{name}/start"], STORED[f"{name}/gradients"])
    moved = (STORED[f"{name}/iterates"] - STORED[f"{name}/start"]).abs().max()
    assert moved > 0.02
    torch.testing.assert_close(found, STORED[f"{name}/iterates"], atol=2e-6, rtol=0)
    assert next(refreshes, None) is None


@pytest.mark.skipif(reference_galore.galore_torch() is None, reason="galore-torch is not installed; it is not kept")
@pytest.mark.parametrize("name", reference_galore.CASES)
def test_steps_are_those_of_the_installed_galore_torch(name):
    found = reference_galore.iterates(GaLoreAdamW, name, *reference_galore.drawn(name))
    torch.testing.assert_close(found, reference_galore.theirs(name), atol=2e-6, rtol=0)


def quadratic(weight, target):
    return (weight - target).square().sum() / 2


def descended(optimizer, weight, target, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        quadratic(weight, target).backward()
        optimizer.step()
    return weight.detach()


def test_full_rank_galore_is_the_plain_optimiser():
    """With r = min(m, n) gradient descent is itself; Adam is not, since its moments live in a turned basis."""
    target = torch.randn(4, 6, generator=generator(), dtype=torch.float64)
    ends = []
    for kind in (GaLoreSGD, GaLoreAdamW):
        for group in ({}, {"rank": 4, "update_proj_gap": 3, "scale": 1.0}):
            weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
            ends.append(descended(kind([{"params": [weight], **group}], lr=0.1), weight, target, 7))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-14, rtol=0)
    assert (ends[2] - ends[3]).abs().max() > 1e-3


def test_a_group_without_rank_is_torchs_adamw():
    """But for eps, which GaLore adds before the moment's bias is corrected, as transformers' AdamW did."""
    target = torch.randn(3, 3, generator=generator(), dtype=torch.float64)
    weights = [nn.Parameter(torch.ones(3, 3, dtype=torch.float64)) for _ in range(2)]
    ours = GaLoreAdamW([weights[0]], lr=0.1, eps=0.0)
    found = (
        descended(ours, weights[0], target, 5),
        descended(torch.optim.Adam([weights[1]], 0.1, eps=1e-30), weights[1], target, 5),
    )
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)


def test_one_period_moves_by_rank_r_and_several_by_more():
    target = torch.randn(6, 8, generator=generator(), dtype=torch.float64)
    ranks = []
    for steps in (5, 10, 15):
        weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
        group = {"params": [weight], "rank": 2, "update_proj_gap": 5}
        ranks.append(int(torch.linalg.matrix_rank(descended(GaLoreAdamW([group], lr=0.1), weight, target, steps))))
    assert ranks == [2, 4, 6]


def test_moments_outlive_a_change_of_the_projection():
    target = torch.randn(4, 6, generator=generator(), dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 2, "update_proj_gap": 2}], lr=0.1)
    descended(optimizer, weight, target, 2)
    state = optimizer.state[weight]
    before, left = state["exp_avg"].clone(), state["left"].clone()
    quadratic(weight, target).backward()
    low = galore.leading_vectors(weight.grad, 2)[0].mT @ weight.grad
    optimizer.step()
    assert not torch.allclose(left, state["left"])
    torch.testing.assert_close(state["exp_avg"], 0.9 * before + 0.1 * low, atol=1e-14, rtol=0)
    assert sum(value.numel() for value in state.values() if torch.is_tensor(value)) == 2 * (2 * 6) + 4 * 2


def test_a_saved_state_goes_on_where_it_was():
    target = torch.randn(5, 4, generator=generator(), dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 2, "update_proj_gap": 4}], lr=0.1)
    descended(optimizer, weight, target, 6)
    twin = nn.Parameter(weight.detach().clone())
    other = GaLoreAdamW([{"params": [twin], "rank": 1}], lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ends = [descended(o, w, target, 6) for o, w in ((optimizer, weight), (other, twin))]
    assert torch.equal(*ends)


def test_half_precision_is_projected_in_single():
    weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
    weight.grad = torch.randn(4, 6, generator=generator()).bfloat16()
    GaLoreAdamW([{"params": [weight], "rank": 2}], lr=0.1).step()
    assert weight.dtype == torch.bfloat16 and weight.abs().max() > 0.01


@pytest.mark.parametrize(
    ("group", "told"),
    [
        ({"rank": 0}, "rank is 0"), ({"rank": 4}, "rank is 4"),
        ({"rank": 1, "update_proj_gap": 0}, "update_proj_gap is 0"),
        ({"rank": 1, "proj_type": "up"}, "'up', expected one of std"), ({"rank": 1, "lr": -1.0}, "lr is -1"),
    ],
)  # fmt: skip
def test_impossible_groups_are_refused(group, told):
    lr = group.pop("lr", 0.1)
    with pytest.raises(ValueError, match=told):
        GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(3, 5))], **group}], lr=lr)
    with pytest.raises(ValueError, match="expected a matrix"):
        GaLoreSGD([{"params": [nn.Parameter(torch.zeros(3))], "rank": 1}])


# ReLoRA


def network(layers=("0", "2"), rank=2, scale=1.0, seed=0):
    """A two-layer network in float64 with LoRA on its layers."""
    base = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    for parameter in base.parameters():
        parameter.data.normal_(generator=generator(seed))
    config = peft.LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=list(layers))
    return peft.get_peft_model(base, config)


def batch(seed=1):
    return torch.randn(16, 5, generator=generator(seed), dtype=torch.float64)


def loss_step(model):
    return model(batch()).cosh().log().mean()


def trained(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_step(model).backward()
        optimizer.step()


def lora_weights(model):
    return [weight for name, weight in model.named_parameters() if "lora_" in name]


def test_restart_merges_and_starts_anew():
    model = network(scale=0.5)
    trained(model, torch.optim.Adam(lora_weights(model), 0.1), 5)
    before, layer = model(batch()), relora.lora_layers(model)["base_model.model.0"]
    merged = layer.base_layer.weight + 0.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    relora.restart(model, generator=generator())
    torch.testing.assert_close(model(batch()), before, atol=1e-13, rtol=0)
    torch.testing.assert_close(layer.base_layer.weight, merged, atol=1e-14, rtol=0)
    for layer in relora.lora_layers(model).values():
        down, bound = layer.lora_A["default"].weight, 1 / math.sqrt(layer.in_features)  # Kaiming with a = sqrt 5
        assert not layer.lora_B["default"].weight.any()
        assert bound / 2 < down.abs().max() <= bound
    assert [w.requires_grad for w in lora_weights(model)] == [True] * 4


def test_restart_draws_the_same_from_a_seed():
    models = [network(), network()]
    for model in models:
        relora.restart(model, generator=generator(7))
    assert all(torch.equal(*pair) for pair in zip(*map(lora_weights, models), strict=True))


@pytest.mark.parametrize("prune", ["random", "magnitude"])
@pytest.mark.parametrize("keep", [0.0, 0.25, 1.0])
def test_restart_keeps_a_share_of_the_moments(prune, keep):
    model = network()
    optimizer = torch.optim.Adam(lora_weights(model), 0.1)
    trained(model, optimizer, 3)
    before = {w: optimizer.state[w]["exp_avg"].clone() for w in lora_weights(model)}
    relora.restart(model, optimizer, keep=keep, prune=prune, generator=generator())
    kept = [(optimizer.state[w]["exp_avg"] != 0).double().mean().item() for w in before]
    assert np.mean(kept) == pytest.approx(keep, abs=0 if keep in (0, 1) else 0.15)
    for weight, moment in before.items():
        now = optimizer.state[weight]["exp_avg"]
        assert torch.equal(now[now != 0], moment[now != 0]) and optimizer.state[weight]["step"] == 3
        if prune == "magnitude" and 0 < keep < 1:
            assert now[now != 0].abs().min() >= moment[now == 0].abs().max()


def test_layers_that_are_not_plain_lora_are_refused():
    base = nn.Sequential(nn.Linear(5, 6))
    dora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    with pytest.raises(ValueError, match=r"base_model\.model\.0 is merged, has a bias or is a variant"):
        relora.restart(dora)
    with pytest.raises(ValueError, match="adapter is 'other'"):
        relora.restart(network(), adapter="other")
    with pytest.raises(ValueError, match="keep is 2"):
        relora.restart(network(), keep=2)


def test_schedule_restarts_under_one_cosine():
    shape = {"steps": 100, "restart_every": 20, "warmup": 10, "restart_warmup": 4, "least": 0.1}
    found = [relora.restart_factor(step, **shape) for step in range(101)]
    plain = [relora.restart_factor(step, **shape | {"restart_warmup": 0}) for step in range(101)]
    assert found[:11] == [step / 10 for step in range(11)]
    assert [step for step in range(1, 100) if found[step] == 0] == [20, 40, 60, 80]
    assert [step for step in range(100) if found[step] != plain[step]] == [
        s + i for s in (20, 40, 60, 80) for i in range(4)
    ]
    assert plain[55] == pytest.approx(0.55) and plain[100] == pytest.approx(0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="restart_warmup 20, expected at most"):
        relora.restart_schedule(optimizer, steps=100, restart_every=20, restart_warmup=20)


# P3, Theorem 4


def pair(kind, period, steps, freeze=True, rate=0.3):
    """Largest difference of the two layers' matrices between GaLore and ReLoRA with B = P, over the steps."""
    full = network().unload()
    matrices = [full[0].weight, full[2].weight]
    for matrix in matrices:
        matrix.requires_grad_(True)
    low = [{"params": matrices, "rank": 2, "update_proj_gap": period, "scale": 1.0, "proj_type": "left"}]
    theirs, model, worst = kind(low, lr=rate), network(), 0.0
    optimizer = kind(lora_weights(model), lr=rate)
    for step in range(steps):
        if step % period == 0:
            relora.restart_from_gradient(model, loss_step)
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora_A" in name or ("lora_B" in name and not freeze))
        trained(model, optimizer, 1)
        trained(full, theirs, 1)
        merged = [
            layer.base_layer.weight + layer.get_delta_weight("default") for layer in relora.lora_layers(model).values()
        ]
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(matrices, merged, strict=True)))
    return worst


@pytest.mark.parametrize("kind", [GaLoreSGD, GaLoreAdamW])
@pytest.mark.parametrize("period", [1, 4, 100])
def test_galore_is_relora_with_frozen_gradient_directions(kind, period):
    assert pair(kind, period, 20, rate=0.3 if kind is GaLoreSGD else 0.01) < 1e-12


def test_relora_that_trains_both_factors_departs_unless_it_restarts_at_each_step():
    """At A = 0 the gradient of B vanishes, so that gradient descent with T = 1 moves A alone."""
    assert pair(GaLoreSGD, 1, 20, freeze=False) < 1e-12
    assert pair(GaLoreSGD, 4, 20, freeze=False) > 1e-3


def test_a_restart_from_the_gradient_holds_its_leading_directions():
    model = network(scale=2.0)
    trained(model, torch.optim.SGD(lora_weights(model), 0.1), 3)
    before = model(batch())
    directions = relora.restart_from_gradient(model, loss_step)
    torch.testing.assert_close(model(batch()), before, atol=1e-13, rtol=0)
    merged = model.merge_and_unload()
    for weight in merged.parameters():
        weight.requires_grad_(True)
    loss_step(merged).backward()
    for name, place in (("base_model.model.0", 0), ("base_model.model.2", 2)):
        left = torch.linalg.svd(merged[place].weight.grad).U[:, :2]
        torch.testing.assert_close(directions[name] @ directions[name].mT, left @ left.mT, atol=1e-12, rtol=0)


def test_a_restart_along_directions_freezes_them():
    model = network()
    trained(model, torch.optim.SGD(lora_weights(model), 0.1), 3)
    before = model(batch())
    given = {name: torch.eye(layer.out_features, 2) for name, layer in relora.lora_layers(model).items()}
    relora.restart_along(model, given)
    torch.testing.assert_close(model(batch()), before, atol=1e-13, rtol=0)
    for name, layer in relora.lora_layers(model).items():
        up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        assert torch.equal(up, given[name].double()) and not up.requires_grad and not down.any()
        assert down.requires_grad and not layer.base_layer.weight.requires_grad


@pytest.mark.parametrize("module", [galore, relora])
def test_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 5 and found.failed == 0
