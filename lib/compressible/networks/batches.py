"""Examples, the order in which a model sees them, and shifted and mirrored images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressible.runtime.checks import expect

PADDING = 4  # pixels by which an image may be shifted, the usual augmentation of CIFAR-10


@dataclass(frozen=True)
class Examples:
    """Inputs with their targets, the whole set in memory.

    Args:
        inputs: (N, ...), float for images and vectors, int64 for the nodes of a graph.
        targets: (N,) int64 class numbers, or (N, outputs) float for the squared loss.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        for name, part in (("inputs", self.inputs), ("targets", self.targets)):
            rows = isinstance(part, Tensor) and part.dim() > 0
            expect(f"type of {name}", type(part).__name__, rows, "a torch tensor (N, ...)")
        if len(self.inputs) != len(self.targets) or len(self.inputs) == 0:
            found = f"{len(self.inputs)} inputs and {len(self.targets)} targets"
            raise ValueError(f"examples have {found}, expected equally many, at least one")

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: str, dtype: torch.dtype | None = None) -> Examples:
        """Return the set on a device, floating numbers in a dtype where one is given."""
        return Examples(*(_moved(part, device, dtype) for part in (self.inputs, self.targets)))


def _moved(part: Tensor, device: str, dtype: torch.dtype | None) -> Tensor:
    moved = part.to(device, dtype if part.is_floating_point() else None)
    return moved.clone() if moved.is_inference() else moved  # no gradient goes through a tensor of inference mode


class Draws:
    """What one model's seed decides: the order of the examples, epoch by epoch, and how each is augmented.

    All is drawn on the CPU, so that a seed means the same batches on every device, and stays the same however many
    are drawn at a time. An epoch's last, incomplete batch is dropped.
    """

    def __init__(self, count: int, batch_size: int, seed: int, augment: bool) -> None:
        self.count, self.batch_size, self.augment = count, batch_size, augment
        self.order = torch.Generator().manual_seed(seed)
        self.moves = torch.Generator().manual_seed(2**32 - 1 - seed)  # it takes 32 bits
        self.left = torch.empty(0, batch_size, dtype=torch.int64)

    def rows(self, steps: int) -> Tensor:
        """Return the examples (steps, B) of the next steps."""
        parts, missing = [], steps
        while missing:
            if not len(self.left):
                whole = self.count // self.batch_size
                self.left = torch.randperm(self.count, generator=self.order)[: whole * self.batch_size]
                self.left = self.left.view(whole, self.batch_size)
            parts.append(self.left[:missing])
            self.left = self.left[missing:]
            missing -= len(parts[-1])
        return torch.cat(parts)

    def shifts(self, steps: int) -> Tensor:
        """Return (steps, B, 3): rows and columns to shift by, 0 to 2 * PADDING, and 0 or 1 for mirroring."""
        size, sides = (steps, self.batch_size), 2 * PADDING + 1
        # one draw an image, so that the stream does not depend on how many steps are drawn at a time
        code = torch.randint(2 * sides**2, size, generator=self.moves)
        return torch.stack([code % sides, code // sides % sides, code // sides**2], -1)


def crop_and_flip(images: Tensor, shifts: Tensor) -> Tensor:
    """Return images (B, C, H, W) cut from a border of zeros at shifts (B, 3) of `Draws.shifts`, some mirrored.

    A shift of (PADDING, PADDING, 0) leaves an image as it is. Zero is the mean pixel of standardised images.
    """
    height, width = images.shape[-2:]
    padded = pad(images, (PADDING,) * 4)
    rows = shifts[:, 0, None] + torch.arange(height, device=images.device)  # (B, H)
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    columns = torch.where(shifts[:, 2, None] == 1, width - 1 - columns, columns) + shifts[:, 1, None]  # (B, W)
    picked = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[picked, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # (B, H, W, C) is channels last
