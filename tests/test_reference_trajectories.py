"""The authors' own trajectories (JAX, float64) from the same starts, for every engine.

The stored curves are facts measured on their code; they lie outside the repository (COMPRESSIBLE_DATA/reference).
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import compressible as cd

FOLDER = Path(os.environ.get("COMPRESSIBLE_DATA", "")) / "reference"
NAMES = ["completion_d100_r5_p30", "factorization_d100_r10"]
pytestmark = pytest.mark.skipif(
    not os.environ.get("COMPRESSIBLE_DATA") or not FOLDER.is_dir(), reason="COMPRESSIBLE_DATA/reference is not there"
)


def _load(name):
    stored = np.load(FOLDER / f"{name}.npz", allow_pickle=False)
    target = torch.tensor(stored["target"])
    if "completion" in name:
        return stored, cd.MatrixCompletion(target, torch.tensor(stored["mask"]))
    return stored, cd.MatrixFactorization(target)


def _worst(mine, stored):
    where = stored > 1e-11
    return float(np.max(np.abs(mine.numpy() - stored)[where] / stored[where]))


@pytest.mark.parametrize("engine", ["fused", "compiled", "reference"])
@pytest.mark.parametrize("kind", ["full", "comp"])
@pytest.mark.parametrize("name", NAMES)
def test_curves_match_to_1e_9(name, kind, engine):
    stored, problem = _load(name)
    factors = [torch.tensor(stored[f"{kind}_init_{layer}"]) for layer in range(1, int(stored["depth"]) + 1)]
    ratios = [1.0] if kind == "full" else [float(ratio) for ratio in stored["outer_ratios"]]
    for index, ratio in enumerate(ratios):
        suffix = "" if kind == "full" else f"_{index}"
        train, test = stored[f"{kind}_train{suffix}"], stored[f"{kind}_test{suffix}"]
        every = int(stored["record_every"])
        length = len(train)
        if engine == "reference":  # the slow path: the stretch with the structure is enough
            length = min(length, int(np.argmax(train < 1e-8)) + 1 if (train < 1e-8).any() else length)
        history = cd.descend(
            problem,
            factors,
            float(stored["step_size"]),
            (length - 1) * every,
            outer_ratio=ratio,
            record_every=every,
            engine=engine,
        )
        assert _worst(history.loss, train[:length]) < 1e-9
        assert _worst(history.error, test[:length]) < 1e-9
        if length == len(train):
            end = torch.tensor(stored[f"{kind}_product{suffix}"])
            torch.testing.assert_close(cd.product(history.factors), end, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_spectral_start_is_theirs(name):
    """Same subspace and scale; the columns' signs are the SVD's own."""
    stored, problem = _load(name)
    width = stored["comp_init_1"].shape[0]
    assert width == 2 * int(stored["rank"])
    mine = cd.compress_spectral(problem, width, depth=3, scale=float(stored["init_scale"]))
    theirs = [torch.tensor(stored[f"comp_init_{layer}"]) for layer in (1, 2, 3)]
    torch.testing.assert_close(mine[1], theirs[1])
    if "completion" in name:  # a factorization's last r directions lie in a null space and are arbitrary
        torch.testing.assert_close(cd.product(mine), cd.product(theirs), rtol=0, atol=1e-14)
