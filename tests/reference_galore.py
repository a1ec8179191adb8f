"""What galore-torch 1.0 gives on fixed gradients: kept in galore_torch_iterates.npz, made anew where it is installed.

`python tests/reference_galore.py` writes the file. galore-torch's package imports bitsandbytes (43 MB, and needless
here), so only its two modules that do not are loaded. No code of theirs is in this repository.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_name("galore_torch_iterates.npz")
STEPS, PERIOD, RANK = 9, 4, 2  # three projections
OPTIONS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
CASES = {  # name: shape, proj_type, other options
    "wide": ((3, 5), "std", {}),
    "tall": ((5, 3), "std", {"weight_decay": 0.3}),
    "longer side": ((5, 3), "reverse_std", {"correct_bias": False}),
    "left": ((5, 4), "left", {}),
    "right": ((3, 5), "right", {"weight_decay": 0.1}),
    "both": ((4, 5), "full", {}),
}


def drawn(name: str) -> tuple[Tensor, Tensor]:
    """The start (m, n) and the gradients (STEPS, m, n) of a case, in float32."""
    generator = torch.Generator().manual_seed(list(CASES).index(name))
    shape = CASES[name][0]
    return torch.randn(shape, generator=generator), torch.randn((STEPS, *shape), generator=generator)


def iterates(optimizer_class: type, name: str, start: Tensor, gradients: Tensor) -> Tensor:
    """The weights (STEPS, m, n) after each step, of a group with a rank whose gradients are given."""
    _, kind, options = CASES[name]
    weight = torch.nn.Parameter(start.clone())
    group = {"params": [weight], "rank": RANK, "update_proj_gap": PERIOD, "scale": 0.25, "proj_type": kind}
    optimizer = optimizer_class([group], **OPTIONS | options)
    found = []
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        found.append(weight.detach().clone())
    return torch.stack(found)


def galore_torch() -> ModuleType | None:
    """galore-torch's module of AdamW, or None where the package, or transformers, is not installed."""
    package = importlib.util.find_spec("galore_torch")
    if package is None or importlib.util.find_spec("transformers") is None:
        return None
    bare = ModuleType("galore_torch")
    bare.__path__ = list(package.submodule_search_locations or [])
    with patch.dict(sys.modules, {"galore_torch": bare}):
        return importlib.import_module("galore_torch.adamw")


def theirs(name: str) -> Tensor:
    """galore-torch's iterates of a case."""
    found = galore_torch()
    assert found is not None, "galore-torch is not installed"
    return iterates(lambda groups, **o: found.AdamW(groups, no_deprecation_warning=True, **o), name, *drawn(name))


def main() -> None:
    """Write the iterates of all cases with their inputs, so that nothing rests on a random number generator."""
    kept = {
        "source": np.array(f"galore-torch {version('galore-torch')}, galore_torch/adamw.py, torch {torch.__version__}")
    }
    for name in CASES:
        start, gradients = drawn(name)
        kept |= {f"{name}/start": start.numpy(), f"{name}/gradients": gradients.numpy()}
        kept[f"{name}/iterates"] = theirs(name).numpy()
        # Another LAPACK may give singular vectors of the other sign, which moments that outlive a projection feel.
        left, _, right = torch.linalg.svd(gradients[::PERIOD], full_matrices=False)
        kept |= {f"{name}/left": left[..., :RANK].numpy(), f"{name}/right": right[:, :RANK].numpy()}
    np.savez_compressed(FILE, **kept)


if __name__ == "__main__":
    main()
