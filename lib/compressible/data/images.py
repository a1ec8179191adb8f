"""Images by name: MNIST's 5,000 digits of a package, FashionMNIST, and CIFAR-10, as tensors of pixels and labels.

CIFAR-10 comes from the published binary archive where that is at hand (local folder or cache), else from local JPEG
copies, which lost a little (accuracies are a point or so lower), else the published archive is fetched: `digests` says
which. MNIST's digits are sorted by class in the package, 500 a class: the first 400 of each are for training, the last
100 for the test, which is ours and no published split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compressible.data import image_files
from compressible.data.manifest import DataError, fetch_all, fetch_first, find, load_manifest
from compressible.runtime.checks import expect, is_integer, unknown

DIGITS = ("mnist-5k/mnist_5k.csv.gz",)
FASHION = tuple(
    f"fashion-mnist/{name}-ubyte"
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
)
CIFAR, CIFAR_JPEG = ("cifar10/cifar-10-binary.tar.gz",), ("cifar10-jpeg/train.tar.gz", "cifar10-jpeg/test.tar.gz")
DIGITS_TEST = 100  # of the 500 of each class

CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their classes.

    Args:
        pixels: (N, C, H, W) uint8, 0 to 255; C is 1 for gray values and 3 for red, green and blue.
        labels: (N,) int64, numbers of the classes.

    Raises:
        ValueError: if the shapes or the types are others.

    Example:
        >>> part = Images(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4))
        >>> rest, held_out = part.split(1, seed=0)
        >>> len(rest), len(held_out), sorted([*rest.labels.tolist(), *held_out.labels.tolist()])
        (3, 1, [0, 1, 2, 3])
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        shape, rows = tuple(self.pixels.shape), tuple(self.labels.shape)
        expect(
            "pixels", (self.pixels.dtype, shape), self.pixels.dtype == torch.uint8 and len(shape) == 4, "uint8, 4 axes"
        )
        expect("labels", (self.labels.dtype, rows), self.labels.dtype == torch.int64 and rows == shape[:1],
               f"int64 of shape {shape[:1]}")  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Images:
        """The images with these numbers, (K,) int64."""
        return Images(self.pixels[rows], self.labels[rows])

    def spread(self, rows: int) -> Images:
        """`rows` images evenly spaced over the set, as some sets are sorted by class; all for 0 or more than there are.

        Raises ValueError for a number below 0.
        """
        expect("spread: rows", rows, is_integer(rows) and rows >= 0, "an integer >= 0")
        return self.take(torch.arange(rows) * len(self) // rows) if 0 < rows < len(self) else self

    def split(self, rows: int, seed: int) -> tuple[Images, Images]:
        """(the rest, `rows` images drawn at random and held out); the same for ever, each in the order of the set.

        Raises ValueError for fewer than one row, or if none would be left.
        """
        total = len(self)
        expect("split: rows", rows, is_integer(rows) and 0 < rows < total, f"1 to {total - 1}")
        # The raw stream of a bit generator never changes; numpy's and PyTorch's permutations may.
        order = np.argsort(np.random.PCG64(seed).random_raw(total), kind="stable")
        held, rest = (torch.from_numpy(np.sort(part)) for part in (order[:rows], order[rows:]))
        return self.take(rest), self.take(held)


@dataclass(frozen=True, eq=False)
class ImageData:
    """An image set: both parts, the classes' names, what standardises pixels, and what was read.

    Args:
        name: "mnist", "fashion-mnist" or "cifar10".
        train, test: the two parts.
        classes: names of the classes, by number.
        mean, std: (C,) float32, of each channel of the training pixels divided by 255.
        digests: sha256 by the name of the file that was read.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    mean: Tensor = field(repr=False)
    std: Tensor = field(repr=False)
    digests: dict[str, str] = field(repr=False)


def load_images(name: str) -> ImageData:
    """A set of images, fetched if need be.

    Args:
        name: "mnist" (4,000 and 1,000 digits, 1 x 28 x 28), "fashion-mnist" (60,000 and 10,000, 1 x 28 x 28) or
            "cifar10" (50,000 and 10,000, 3 x 32 x 32).

    Returns:
        The `ImageData`; about 4, 55 or 184 MB of pixels.

    Raises:
        ValueError: for an unknown name.
        DataError: if the files cannot be had, or are not what they should be.

    Example:
        >>> data = load_images("mnist")  # doctest: +SKIP
        >>> len(data.train), tuple(data.train.pixels.shape[1:]), data.classes[:3]  # doctest: +SKIP
        (4000, (1, 28, 28), ('0', '1', '2'))

    Reference:
        P2's nonlinear experiments train on MNIST, FashionMNIST and CIFAR-10; P3's ResNet on CIFAR-10.
    """
    files, read = _files(name), _READERS[name]
    train, test = (Images(torch.from_numpy(pixels), torch.from_numpy(labels)) for pixels, labels in read(files))
    mean, std = _channel_moments(train.pixels)
    return ImageData(name, train, test, CLASSES[name], mean, std, _digests(files))


def digests(name: str) -> dict[str, str]:
    """{file: sha256} of what `load_images(name)` reads, which is fetched; for the record of a run.

    Raises ValueError for an unknown name and DataError if the files cannot be had.
    """
    return _digests(_files(name))


def standardised(part: Images, mean: Tensor, std: Tensor) -> Tensor:
    """(N, C, H, W) float32: (pixels / 255 - mean) / std, channel by channel.

    Args:
        part: images with pixels (N, C, H, W).
        mean, std: (C,), usually the training set's, as `ImageData` holds them.

    Raises:
        ValueError: if the shapes do not fit, or if a deviation is not positive.

    Example:
        >>> part = Images(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64))
        >>> standardised(part, torch.tensor([0.5]), torch.tensor([0.25])).flatten().tolist()
        [-2.0, 2.0]
    """
    channels = part.pixels.shape[1]
    for what, values in (("mean", mean), ("std", std)):
        expect(what, tuple(values.shape), values.shape == (channels,), f"the shape ({channels},)")
    expect("std", std.tolist(), bool((std > 0).all()), "positive values")
    mean, std = (values.to(part.pixels.device, torch.float32).view(1, -1, 1, 1) for values in (mean, std))
    return part.pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


def _channel_moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) mean and deviation of pixels / 255: from counts of the 256 values, so exact whatever the machine."""
    counts = torch.stack([torch.bincount(plane.flatten(), minlength=256) for plane in pixels.unbind(1)]).double()
    values, total = torch.arange(256, dtype=torch.float64) / 255, counts.sum(1)
    mean = counts @ values / total
    variance = counts @ values.square() / total - mean.square()
    return mean.float(), variance.clamp_min(0).sqrt().float()


def _digests(files: tuple[str, ...]) -> dict[str, str]:
    known = load_manifest()
    return {name: known[name].sha256 for name in files}


def _files(name: str) -> tuple[str, ...]:
    """The names of the files that a set is read from, after they were fetched."""
    if name not in CLASSES:
        raise ValueError(unknown("image set", name, CLASSES))
    files = {"mnist": DIGITS, "fashion-mnist": FASHION}.get(name) or _cifar_files()
    fetch_all(files)
    return files


def _cifar_files() -> tuple[str, ...]:
    for files in (CIFAR, CIFAR_JPEG):
        if all(find(file) for file in files):
            return files
    fetch_first((*CIFAR, *CIFAR_JPEG))  # if there is neither, the error names both forms and what to do
    return CIFAR if find(CIFAR[0]) else CIFAR_JPEG


def _read_digits(files: tuple[str, ...]) -> list[image_files.Part]:
    pixels, labels = image_files.read_digits(fetch_all(files)[0])
    rows = np.stack([np.flatnonzero(labels == label) for label in range(10)]) if _is_even(labels) else None
    if rows is None or rows.shape[1] <= DIGITS_TEST:
        raise DataError(f"{files[0]}: {np.bincount(labels).tolist()} digits of each class, expected 500 of each of 10")
    parts = (rows[:, :-DIGITS_TEST].flatten(), rows[:, -DIGITS_TEST:].flatten())
    return [(pixels[part], labels[part]) for part in parts]


def _is_even(labels: np.ndarray) -> bool:
    return len(set(np.bincount(labels, minlength=10).tolist())) == 1


def _read_fashion(files: tuple[str, ...]) -> list[image_files.Part]:
    images, labels, test_images, test_labels = fetch_all(files)
    return [image_files.read_idx_pair(images, labels), image_files.read_idx_pair(test_images, test_labels)]


def _read_cifar(files: tuple[str, ...]) -> list[image_files.Part]:
    paths, splits = fetch_all(files), {"train": 50_000, "test": 10_000}
    if files == CIFAR:
        return [image_files.read_cifar_binary(paths[0], split) for split in splits]
    read = partial(image_files.read_jpegs, classes=CLASSES["cifar10"])
    return [read(path, split, rows=rows) for path, (split, rows) in zip(paths, splits.items(), strict=True)]


_READERS: dict[str, Callable[[tuple[str, ...]], list[image_files.Part]]] = {
    "mnist": _read_digits, "fashion-mnist": _read_fashion, "cifar10": _read_cifar,
}  # fmt: skip
