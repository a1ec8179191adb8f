"""Spectra of updates against plain singular value decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressible.finetuning.update_spectra import captured, cosines, leading_triplets, watch_spectra

LAYERS = {"wide": (6, 9), "tall": (8, 5)}


class Snapshot:
    """What `watch` is given, with updates (S, m, n) of three runs."""

    runs = (0, 1, 2)

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.matrices = {name: torch.randn(3, *shape, generator=draw) for name, shape in LAYERS.items()}

    def updates(self):
        return iter(self.matrices.items())


@pytest.mark.parametrize("shape", [(4, 6, 9), (9, 6)])
@pytest.mark.parametrize("scale", [1e-12, 1.0])
def test_triplets_are_those_of_the_svd(shape, scale):
    matrices = scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = leading_triplets(matrices, 3)
    expected = torch.linalg.svd(matrices.double())
    torch.testing.assert_close(values, expected.S[..., :3], rtol=1e-5, atol=0)
    parts = left.double() * values[..., None, :] @ right.double().mT
    cut = expected.U[..., :3] * expected.S[..., None, :3] @ expected.Vh[..., :3, :]
    torch.testing.assert_close(parts / scale, cut / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_subspaces_are_compared_with_the_last_step(side):
    snapshots = {step: Snapshot(step) for step in (0, 5, 7)}
    watch = watch_spectra(4)
    seen = {step: watch(snapshot)[1] for step, snapshot in snapshots.items()}
    assert seen[0].layers == list(LAYERS) and seen[0].values.shape == (2, 4)
    found, shares = cosines(seen, 2, side), captured(seen, 2, side)
    assert found.shape == (3, 2, 2) and shares.shape == (3, 2)
    np.testing.assert_allclose(found[-1], 1, atol=1e-6)
    np.testing.assert_allclose(shares[-1], 1, atol=1e-6)
    for row, name in enumerate(LAYERS):
        svds = [torch.linalg.svd(snapshots[step].matrices[name][1]) for step in (5, 7)]
        now, end = (s.U[:, :2] if side == "outputs" else s.Vh[:2].T for s in svds)
        np.testing.assert_allclose(found[1, row], torch.linalg.svdvals(now.T @ end), atol=1e-5)
        weighted = end * svds[1].S[:2]
        expected = (now.T @ weighted).square().sum() / weighted.square().sum()
        assert shares[1, row] == pytest.approx(expected.item(), abs=1e-5)


def test_a_layer_with_fewer_directions_has_zeros_behind():
    (first, *_) = watch_spectra(6)(Snapshot(0))
    assert first.values.shape == (2, 6) and first.values[1, 5] == 0 < first.values[1, 4]
    with pytest.raises(ValueError, match="directions is 6, expected 1 to the 5"):
        cosines({0: first}, 6)


def test_bad_values_are_named():
    seen = {0: watch_spectra(2)(Snapshot(0))[0]}
    with pytest.raises(ValueError, match="count is 0"):
        watch_spectra(0)
    with pytest.raises(ValueError, match="directions is 3"):
        captured(seen, 3)
    with pytest.raises(ValueError, match="side is 'left'"):
        cosines(seen, 2, "left")
