"""What models draw by themselves, from generators of torch, Python and numpy: whether they do, and of which seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def random_states(device: torch.device) -> list[object]:
    """Return the states of all generators that models draw from: torch's, Python's and numpy's."""
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    torchs = [state.numpy().tobytes() for state in (torch.get_rng_state(), *on_gpu)]
    _, words, *at = np.random.get_state()
    return [*torchs, random.getstate(), np.asarray(words).tobytes(), at]


@contextmanager
def undrawn(device: torch.device) -> Iterator[None]:
    """Leave all generators as they were."""
    pythons, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Let models draw from generators of this seed, 0 to 2^63 - 1, and leave all as they were.

    A CUDA graph that is replayed meanwhile draws from them, too.
    """
    with undrawn(device):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU of the caller's, too
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
