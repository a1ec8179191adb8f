"""Readers of the files that hold images: each gives pixels (N, C, H, W) and labels (N,) as numpy arrays, checked.

Nothing is unpickled. The only slow one is for JPEG files, 60,000 of which take about 20 s, so that what it decoded is
kept in the cache, under the sha256 of the archive: a numpy archive, whose members carry checksums.
"""

from __future__ import annotations

import gzip
import io
import math
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from compressible.data.manifest import DataError, sha256
from compressible.runtime.paths import atomic_path, cache_dir

Part = tuple[np.ndarray, np.ndarray]  # pixels uint8 (N, C, H, W), labels int64 (N,)

IDX_IMAGES, IDX_LABELS = 0x0803, 0x0801  # unsigned bytes of three dimensions, and of one
CIFAR_SHAPE = (3, 32, 32)
CIFAR_BATCHES = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}


def read_idx_pair(images: Path, labels: Path) -> Part:
    """Pixels (N, 1, H, W) and labels of a pair of files in the idx format of MNIST; DataError if they do not fit."""
    pixels, classes = read_idx(images, IDX_IMAGES), read_idx(labels, IDX_LABELS)
    if len(pixels) != len(classes):
        raise DataError(f"{images} has {len(pixels)} images and {labels} {len(classes)} labels, expected as many")
    return pixels[:, None], classes.astype(np.int64)


def read_idx(path: Path, magic: int) -> np.ndarray:
    """The uint8 array of an idx file: a big-endian magic number, the sizes, the bytes; DataError for any other."""
    content = path.read_bytes()
    found = int.from_bytes(content[:4], "big")
    if len(content) < 4 or found != magic:
        raise DataError(f"{path}: magic number is {found}, expected {magic}")
    start = 4 + 4 * (magic & 0xFF)  # the magic number's last byte is the number of dimensions
    sizes = tuple(
        int(size) for size in np.frombuffer(content[4:start], dtype=">u4", count=(len(content[:start]) - 4) // 4)
    )
    if len(content) != start + math.prod(sizes):
        raise DataError(f"{path}: {len(content)} bytes, expected {start + math.prod(sizes)} for the sizes {sizes}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(sizes).copy()


def read_digits(path: Path, side: int = 28, classes: int = 10) -> Part:
    """Pixels (N, 1, side, side) and labels of a gzipped CSV file, whose rows are pixels and a label; else DataError."""
    try:
        with gzip.open(path, "rt") as stream:
            table = np.loadtxt(stream, delimiter=",", dtype=np.int64, ndmin=2)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is no gzipped table of integers: {error}") from error
    if table.shape[1] != side**2 + 1:
        raise DataError(f"{path}: {table.shape[1]} columns, expected {side**2} pixels and a label")
    pixels, labels = table[:, :-1], table[:, -1]
    for what, values, top in (("pixels", pixels, 255), ("labels", labels, classes - 1)):
        if values.min() < 0 or values.max() > top:
            raise DataError(f"{path}: {what} from {values.min()} to {values.max()}, expected 0 to {top}")
    return pixels.astype(np.uint8).reshape(-1, 1, side, side), labels.copy()


def read_cifar_binary(path: Path, split: str, rows: int = 10_000) -> Part:
    """Pixels and labels of CIFAR-10's published binary archive: rows of a label and 3 planes; DataError if damaged."""
    batches = []
    with tarfile.open(path) as archive:
        for batch in CIFAR_BATCHES[split]:
            try:
                stream = archive.extractfile(f"cifar-10-batches-bin/{batch}")
            except KeyError:
                stream = None
            content = stream.read() if stream else b""
            if len(content) != rows * (1 + math.prod(CIFAR_SHAPE)):
                expected = rows * (1 + math.prod(CIFAR_SHAPE))
                raise DataError(f"{path}: {batch} has {len(content)} bytes, expected {expected}")
            batches.append(np.frombuffer(content, dtype=np.uint8).reshape(rows, -1))
    table = np.concatenate(batches)
    return table[:, 1:].reshape(-1, *CIFAR_SHAPE).copy(), table[:, 0].astype(np.int64)


def read_jpegs(path: Path, split: str, classes: Sequence[str], rows: int) -> Part:
    """Pixels and labels of an archive with files `split/class/number.jpg`, in its order; decoded once, then kept."""
    kept = cache_dir() / "decoded" / f"{sha256(path)}.npz"
    found = _read_decoded(kept, rows)
    if found is None:
        found = _decode(path, split, classes)
        if len(found[1]) != rows:
            raise DataError(f"{path}: {len(found[1])} images, expected {rows}")
        try:
            with atomic_path(kept) as temporary:
                np.savez(temporary, pixels=found[0], labels=found[1])
        except OSError:
            pass  # a cache that cannot be written costs the next caller time and nothing else
    return found


def _read_decoded(kept: Path, rows: int) -> Part | None:
    """What an earlier call decoded; None if there is nothing, or if it is damaged."""
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            pixels, labels = arrays["pixels"], arrays["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    fits = pixels.dtype == np.uint8 and labels.dtype == np.int64 and labels.shape == (rows,)
    return (pixels, labels) if fits and pixels.shape == (rows, *CIFAR_SHAPE) else None


def _decode(path: Path, split: str, classes: Sequence[str]) -> Part:
    number = {name: label for label, name in enumerate(classes)}
    pixels, labels = [], []
    for name, image in _members(path):
        folder, _, rest = name.partition("/")
        kind = rest.partition("/")[0]
        if folder != split or kind not in number:
            raise DataError(f"{path} has a member {name!r}, expected {split}/<class>/<number>.jpg, one of {classes}")
        if image.shape != CIFAR_SHAPE:
            raise DataError(f"{path}: {name} has the shape {image.shape}, expected {CIFAR_SHAPE}")
        pixels.append(image)
        labels.append(number[kind])
    return np.stack(pixels) if pixels else np.empty((0, *CIFAR_SHAPE), np.uint8), np.array(labels, dtype=np.int64)


def _members(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, pixels (C, H, W)) of every file of an archive of images; DataError for what Pillow cannot read."""
    from PIL import Image, UnidentifiedImageError

    with tarfile.open(path) as archive:
        for item in archive:
            if not item.isfile() or (stream := archive.extractfile(item)) is None:
                continue
            try:
                image = Image.open(io.BytesIO(stream.read()))
                yield item.name, np.asarray(image.convert("RGB")).transpose(2, 0, 1)
            except (UnidentifiedImageError, OSError) as error:
                raise DataError(f"{path}: {item.name} is no image: {error}") from error
