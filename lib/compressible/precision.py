"""The precision of CUDA's float32 products: full, or TensorFloat-32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Let CUDA's float32 products use TensorFloat-32 inside for the name "tf32", and not for any other."""
    settings, before = torch.backends.cuda.matmul, tensor_float_32()
    named = getattr(settings, "fp32_precision", None)  # PyTorch 2.9's way to say it
    settings.allow_tf32 = name == "tf32"  # sets both
    try:
        yield
    finally:
        settings.allow_tf32 = before
        if named is not None:
            settings.fp32_precision = named


def tensor_float_32() -> bool:
    """Whether CUDA's float32 products use TensorFloat-32; the older flag may not be read once the newer was set."""
    settings = torch.backends.cuda.matmul
    return settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
