"""The rooms: which of them the core loops run through, found by watching every call that is made."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from torch import Tensor, nn

import compressible as cd

ROOT = str(REPOSITORY / "lib" / "compressible")
MOST = 3  # rooms that a reader must open to follow one loop


@contextmanager
def rooms_entered(found: set[str]):
    """Collect the rooms whose functions are called inside, in this thread and in those that it starts."""

    def look(frame, event, argument):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(ROOT) and frame.f_code.co_name != "<module>":
            place = Path(name).relative_to(ROOT).parts
            found.update(place[:1] if len(place) > 1 else ())

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


class Bag(nn.Module):
    """Mean of embedded tokens through two linear layers: the least that can be fine-tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(input_ids))).mean(1))


@dataclass
class Rows:
    tokens: dict[str, Tensor]
    labels: Tensor


@dataclass
class Regression:
    train: Rows
    validation: Rows
    kind: str = "regression"
    name: str = "sums"

    def score(self, predicted, expected) -> float:
        return -float(((predicted[:, 0] - expected) ** 2).mean())


def completion() -> tuple[cd.MatrixCompletion, list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    problem = cd.MatrixCompletion(cd.low_rank_target((12, 12), 2, generator=draw), cd.random_mask((12, 12), 0.6))
    return problem, cd.orthogonal_factors((12, 12), 3, scale=0.1, generator=draw)


def descend() -> None:
    problem, factors = completion()
    for engine in ("reference", "auto"):
        cd.descend(problem, factors, step_size=0.1, steps=3, engine=engine, show_progress=False)


def compress() -> None:
    problem, factors = completion()
    cd.compress_from_gradient(problem, factors, rank=2)
    cd.compress_spectral(problem, width=4)


def fine_tune() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [Rows({"input_ids": torch.randint(20, (12, 5), generator=draw)}, torch.rand(12)) for _ in range(2)]
    config = cd.DeepLoraConfig(r=2, target_modules=["hidden"], modules_to_save=["head"])
    runs = [cd.FineTuningRun(config, lr=1e-3, seed=seed) for seed in range(2)]
    cd.fine_tune(Bag(), runs, Regression(*parts), steps=2, batch_size=4, evaluate_at=[2], show_progress=False)


def train_networks() -> None:
    nets = [cd.networks.models.seeded(seed, cd.networks.models.mlp, 4, 6, 2) for seed in range(2)]
    rows = cd.networks.training.Examples(torch.eye(4), torch.tensor([0, 1, 0, 1]))
    for net in nets:
        cd.factorize(
            net, [net.penultimate], width=2, start="gradient", loss_step=lambda net: net(rows.inputs)[:, 0].sum()
        )
    for stacked in (True, False):
        cd.networks.training.train(nets, rows, rows, learning_rates=[0.01] * 2, steps=3, batch_size=2, stacked=stacked)


def judge_a_claim() -> None:
    claims = cd.claims.load_claims()
    assert claims
    cd.claims.table(REPOSITORY / "figures", preset="own")


@pytest.mark.parametrize("loop", [descend, compress, fine_tune, train_networks, judge_a_claim])
def test_a_core_loop_crosses_at_most_three_rooms(loop: Callable[[], None], monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("COMPRESSIBLE_FIGURES", raising=False)
    found: set[str] = set()
    for name in cd.__all__:
        getattr(cd, name)  # which imports it: bodies of classes are no calls
    with rooms_entered(found):
        loop()
    assert 0 < len(found) <= MOST, found


def test_running_a_notebook_crosses_at_most_three_rooms(add_notebook):
    from compressible.companion.command_line import main

    id, found = add_notebook("01_good"), set()
    with rooms_entered(found):
        assert main(["run", id]) == 0
    assert 0 < len(found) <= MOST, found
