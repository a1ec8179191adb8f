"""Image sets: files of each format read as written, damaged ones refused, and the real sets where they can be had."""

from __future__ import annotations

import gzip
import io
import os
import tarfile

import numpy as np
import pytest
import torch
from data_helpers import write_manifest

from compressible import data
from compressible.data import image_files, images

NETWORK = os.environ.get("COMPRESSIBLE_NETWORK_TESTS") == "1"


def needs(*files: str) -> pytest.MarkDecorator:
    here = all(data.find(file) for file in files)
    return pytest.mark.skipif(not here and not NETWORK, reason=f"needs {files[0]}, or COMPRESSIBLE_NETWORK_TESTS=1")


needs_digits, needs_fashion = needs(*images.DIGITS), needs(*images.FASHION)
needs_jpegs = pytest.mark.skipif(
    not all(data.find(file) for file in images.CIFAR_JPEG), reason="needs cifar10-jpeg in COMPRESSIBLE_DATA"
)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMPRESSIBLE_DATA", raising=False)
    return tmp_path / "cache"


def idx(array: np.ndarray, magic: int) -> bytes:
    return magic.to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_idx_files_are_read_as_written(tmp_path):
    pixels, labels = random_pixels(3, 4, 5), np.array([2, 0, 9], dtype=np.uint8)
    (tmp_path / "images").write_bytes(idx(pixels, 2051))
    (tmp_path / "labels").write_bytes(idx(labels, 2049))
    read, classes = image_files.read_idx_pair(tmp_path / "images", tmp_path / "labels")
    assert read.dtype == np.uint8 and np.array_equal(read, pixels[:, None])
    assert classes.dtype == np.int64 and classes.tolist() == [2, 0, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], r"75 bytes, expected 76 for the sizes \(3, 4, 5\)"),
        (lambda content: content + b"x", r"77 bytes, expected 76"),
        (lambda content: content[:10], r"10 bytes, expected"),
        (lambda content: content[:2], r"magic number is 0, expected 2051"),
        (lambda content: (2049).to_bytes(4, "big") + content[4:], r"magic number is 2049, expected 2051"),
        (gzip.compress, r"magic number is \d+, expected 2051"),
    ],
)
def test_idx_files_that_are_damaged_are_refused(tmp_path, change, message):
    (tmp_path / "images").write_bytes(change(idx(random_pixels(3, 4, 5), 2051)))
    with pytest.raises(data.DataError, match=message):
        image_files.read_idx(tmp_path / "images", image_files.IDX_IMAGES)


def test_images_and_labels_must_be_as_many(tmp_path):
    (tmp_path / "images").write_bytes(idx(random_pixels(3, 4, 5), 2051))
    (tmp_path / "labels").write_bytes(idx(np.zeros(2, dtype=np.uint8), 2049))
    with pytest.raises(data.DataError, match=r"has 3 images and .*labels 2 labels, expected as many"):
        image_files.read_idx_pair(tmp_path / "images", tmp_path / "labels")


def digits_file(table: np.ndarray) -> bytes:
    return gzip.compress("".join(",".join(map(str, row)) + "\n" for row in table.tolist()).encode())


def digits(of_each: int, last: int = 0) -> np.ndarray:
    """Rows of 784 pixels and a label; the first pixels tell the number of the row within its class."""
    labels = np.repeat(np.arange(10), of_each)[: 10 * of_each - last]
    table = np.zeros((len(labels), 785), dtype=np.int64)
    table[:, -1], table[:, 0], table[:, 1] = labels, np.tile(np.arange(of_each), 10)[: len(labels)] % 200, 7
    return table


def test_digits_are_split_within_each_class(tmp_path, own_cache, monkeypatch):
    content = digits_file(digits(103))
    write_manifest(tmp_path / "m.toml", {images.DIGITS[0]: (content, [])})
    (tmp_path / "mnist-5k").mkdir()
    (tmp_path / images.DIGITS[0]).write_bytes(content)
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path))
    read = images.load_images("mnist")
    assert torch.bincount(read.train.labels).tolist() == [3] * 10
    assert torch.bincount(read.test.labels).tolist() == [100] * 10
    assert read.train.pixels[:, 0, 0, 0].tolist() == [0, 1, 2] * 10  # the first of each class
    assert set(read.test.pixels[:, 0, 0, 0].tolist()) == set(range(3, 103))
    assert read.digests == images.digests("mnist") == {images.DIGITS[0]: data.sha256(tmp_path / images.DIGITS[0])}
    values = torch.zeros(30, 784)
    values[:, 0], values[:, 1] = torch.tensor([0.0, 1.0, 2.0] * 10), 7.0
    assert read.mean.item() == pytest.approx((values / 255).mean().item(), rel=1e-5)
    assert read.std.item() == pytest.approx((values / 255).std(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (digits_file(digits(101)[:, 1:]), "784 columns, expected 784 pixels and a label"),
        (digits_file(digits(101) + 1), "labels from 1 to 10, expected 0 to 9"),
        (digits_file(digits(101) - np.eye(1, 785, dtype=np.int64)), "pixels from -1 to 99, expected 0 to 255"),
        (digits_file(digits(101, last=1)), r"101, 100\] digits of each class, expected 500"),
        (digits_file(digits(101))[:-30], "no gzipped table of integers"),
        (b"1,2,3", "no gzipped table of integers"),
    ],
)
def test_digits_that_are_damaged_are_refused(tmp_path, own_cache, monkeypatch, content, message):
    write_manifest(tmp_path / "m.toml", {images.DIGITS[0]: (content, [])})
    (tmp_path / "mnist-5k").mkdir()
    (tmp_path / images.DIGITS[0]).write_bytes(content)
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path))
    with pytest.raises(data.DataError, match=message):
        images.load_images("mnist")


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
    return path


def test_cifars_binary_archive_is_read_in_the_order_of_its_batches(tmp_path):
    tables = random_pixels(6, 4, 3073) % 10
    names = [*image_files.CIFAR_BATCHES["train"], *image_files.CIFAR_BATCHES["test"]]
    members = {f"cifar-10-batches-bin/{name}": table.tobytes() for name, table in zip(names, tables, strict=True)}
    path = write_tar(tmp_path / "c.tar.gz", dict(reversed(members.items())))
    pixels, labels = image_files.read_cifar_binary(path, "train", rows=4)
    assert pixels.shape == (20, 3, 32, 32) and labels.tolist() == tables[:5, :, 0].flatten().tolist()
    assert np.array_equal(pixels[5, 1].flatten(), tables[1, 1, 1 + 1024 : 1 + 2048])  # planes of green values
    assert image_files.read_cifar_binary(path, "test", rows=4)[1].tolist() == tables[5, :, 0].tolist()
    with pytest.raises(data.DataError, match=r"data_batch_1\.bin has 12292 bytes, expected 15365"):
        image_files.read_cifar_binary(path, "train", rows=5)
    path = write_tar(tmp_path / "c.tar.gz", {})
    with pytest.raises(data.DataError, match=r"test_batch\.bin has 0 bytes"):
        image_files.read_cifar_binary(path, "test", rows=4)


def jpeg(colour: tuple[int, int, int], side: int = 32) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


COLOURS = {"cat": (250, 10, 10), "dog": (10, 250, 10), "owl": (10, 10, 250)}


@pytest.fixture
def jpegs(tmp_path, own_cache):
    members = {f"train/{name}/0000.jpg": jpeg(colour) for name, colour in COLOURS.items()}
    return write_tar(tmp_path / "train.tar.gz", members)


def test_jpegs_are_decoded_once_and_again_if_what_was_kept_is_damaged(jpegs, own_cache, monkeypatch):
    pixels, labels = image_files.read_jpegs(jpegs, "train", ("owl", "cat", "dog"), 3)
    assert labels.tolist() == [1, 2, 0] and pixels.shape == (3, 3, 32, 32)
    for image, colour in zip(pixels, COLOURS.values(), strict=True):
        assert np.abs(image.mean((1, 2)) - colour).max() < 4  # channels come first, red before blue
    (kept,) = (own_cache / "decoded").iterdir()
    assert kept.stem == data.sha256(jpegs)
    calls, decode = [], image_files._decode
    monkeypatch.setattr(image_files, "_decode", lambda *given: calls.append(given) or decode(*given))
    whole = kept.read_bytes()
    turned = bytearray(whole)
    turned[len(turned) // 2] ^= 1
    for content, decoded in ((whole, 0), (bytes(turned), 1), (whole[:-100], 1), (b"", 1), (b"text", 1), (None, 1)):
        calls.clear()
        kept.unlink() if content is None else kept.write_bytes(content)
        again = image_files.read_jpegs(jpegs, "train", ("owl", "cat", "dog"), 3)
        assert np.array_equal(again[0], pixels) and np.array_equal(again[1], labels) and len(calls) == decoded
        assert [file.name for file in (own_cache / "decoded").iterdir()] == [kept.name]
        assert kept.read_bytes() == whole or decoded


def test_jpegs_are_read_where_nothing_can_be_kept(jpegs, own_cache):
    own_cache.write_text("a file where the cache should be")
    assert image_files.read_jpegs(jpegs, "train", tuple(COLOURS), 3)[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"train/cat/1.jpg": jpeg((0, 0, 0))}, "1 images, expected 2"),
        ({}, "0 images, expected 2"),
        ({"train/cow/1.jpg": jpeg((0, 0, 0))}, r"member 'train/cow/1\.jpg', expected train/<class>/<number>\.jpg"),
        ({"test/cat/1.jpg": jpeg((0, 0, 0))}, r"member 'test/cat/1\.jpg'"),
        ({"train/cat/1.jpg": jpeg((0, 0, 0), 16)}, r"shape \(3, 16, 16\), expected \(3, 32, 32\)"),
        ({"train/cat/1.jpg": jpeg((9, 9, 9))[:-400]}, r"train/cat/1\.jpg is no image"),
        ({"train/cat/1.jpg": b"text"}, r"train/cat/1\.jpg is no image"),
    ],
)
def test_archives_of_jpegs_that_are_not_as_expected_are_refused(tmp_path, own_cache, members, message):
    path = write_tar(tmp_path / "train.tar.gz", members)
    with pytest.raises(data.DataError, match=message):
        image_files.read_jpegs(path, "train", tuple(COLOURS), 2)
    assert not (own_cache / "decoded").exists()


def test_cifar_without_any_copy_names_both_forms(own_cache, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_OFFLINE", "1")
    with pytest.raises(data.DataError) as caught:
        images.load_images("cifar10")
    assert all(file in str(caught.value) for file in (*images.CIFAR, *images.CIFAR_JPEG))


def test_the_published_cifar_goes_before_the_jpegs(tmp_path, own_cache, monkeypatch):
    contents = {name: name.encode() for name in (*images.CIFAR, *images.CIFAR_JPEG)}
    write_manifest(tmp_path / "m.toml", {name: (content, []) for name, content in contents.items()})
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path / "local"))

    def place(name: str) -> None:
        path = tmp_path / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[name])

    place(images.CIFAR_JPEG[0])
    with pytest.raises(data.DataError, match=r"cannot get cifar10-jpeg/test\.tar\.gz"):
        images.digests("cifar10")
    place(images.CIFAR_JPEG[1])
    assert tuple(images.digests("cifar10")) == images.CIFAR_JPEG
    place(images.CIFAR[0])
    assert tuple(images.digests("cifar10")) == images.CIFAR


def some_images(rows: int = 10) -> images.Images:
    return images.Images(torch.from_numpy(random_pixels(rows, 2, 3, 3)), torch.arange(rows))


def test_a_split_is_a_partition_that_depends_on_the_seed_alone():
    whole = some_images()
    parts = [whole.split(4, seed) for seed in (0, 0, 1)]
    for rest, held in parts:
        assert (len(rest), len(held)) == (6, 4)
        assert sorted([*rest.labels.tolist(), *held.labels.tolist()]) == list(range(10))
        assert torch.equal(rest.pixels, whole.pixels[rest.labels]) and torch.equal(
            held.pixels, whole.pixels[held.labels]
        )
    held = [part[1].labels.tolist() for part in parts]
    assert held[0] == held[1] != held[2]
    raw = np.random.PCG64(0).random_raw(10)
    assert held[0] == sorted(np.argsort(raw)[:4].tolist())


def test_spread_images_are_evenly_spaced_and_all_for_0_or_too_many():
    whole = some_images()
    assert whole.spread(5).labels.tolist() == whole.labels[::2].tolist()
    assert len(whole.spread(0)) == len(whole.spread(99)) == len(whole) == 10
    with pytest.raises(ValueError, match="spread: rows is -1"):
        whole.spread(-1)


@pytest.mark.parametrize("rows", [0, 10, -1, 2.0, True])
def test_a_split_without_a_row_on_either_side_is_refused(rows):
    with pytest.raises(ValueError, match=rf"split: rows is {rows}, expected 1 to 9"):
        some_images().split(rows, 0)


def test_standardised_pixels_have_mean_zero_and_deviation_one_in_each_channel():
    part = some_images(50)
    mean, std = images._channel_moments(part.pixels)
    values = images.standardised(part, mean, std)
    assert values.dtype == torch.float32 and values.shape == part.pixels.shape
    assert values.mean((0, 2, 3)).abs().max() < 1e-5
    assert (values.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    assert part.pixels.dtype == torch.uint8


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], [0.5, 0.5], r"mean is \(1,\), expected the shape \(2,\)"),
        ([0.5, 0.5], [[0.5, 0.5]], r"std is \(1, 2\), expected"),
        ([0.5, 0.5], [0.5, 0.0], r"std is \[0\.5, 0\.0\], expected positive values"),
    ],
)
def test_standardising_by_what_does_not_fit_is_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        images.standardised(some_images(), torch.tensor(mean), torch.tensor(std))


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 1, 2, 2), torch.arange(2), "pixels is .*float32"),
        (torch.zeros(2, 4, dtype=torch.uint8), torch.arange(2), r"pixels is .*\(2, 4\)\), expected uint8, 4 axes"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.arange(3), r"labels is .*, expected int64 of shape \(2,\)"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2), "labels is .*float32"),
    ],
)  # fmt: skip
def test_images_that_do_not_fit_are_refused(pixels, labels, message):
    with pytest.raises(ValueError, match=message):
        images.Images(pixels, labels)


def test_an_unknown_set_gives_the_closest():
    with pytest.raises(ValueError, match="unknown image set 'fashion'; the closest is 'fashion-mnist'"):
        images.load_images("fashion")


@needs_digits
def test_the_digits_are_mnists():
    read = images.load_images("mnist")
    assert (len(read.train), len(read.test)) == (4000, 1000) and read.train.pixels.shape[1:] == (1, 28, 28)
    assert torch.bincount(read.train.labels).tolist() == [400] * 10
    assert read.mean.item() == pytest.approx(0.1307, abs=1e-3)  # of all 60,000: .1307 and .3081
    assert read.std.item() == pytest.approx(0.3081, abs=1e-3)


@needs_fashion
def test_fashion_mnist_is_the_published_one():
    read = images.load_images("fashion-mnist")
    assert torch.bincount(read.train.labels).tolist() == [6000] * 10
    assert torch.bincount(read.test.labels).tolist() == [1000] * 10
    assert read.train.labels[:5].tolist() == [9, 0, 0, 3, 0] and read.classes[9] == "ankle boot"
    assert (round(read.mean.item(), 4), round(read.std.item(), 4)) == (0.2860, 0.3530)  # as everybody writes them


@needs_jpegs
def test_the_jpeg_copies_are_cifar10(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path))
    path = data.fetch("cifar10-jpeg/test.tar.gz")
    pixels, labels = image_files.read_jpegs(path, "test", images.CLASSES["cifar10"], 10_000)
    assert np.bincount(labels).tolist() == [1000] * 10
    mean, _ = images._channel_moments(torch.from_numpy(pixels))
    assert mean.tolist() == pytest.approx([0.4942, 0.4851, 0.4504], abs=1e-3)  # of the lossless test images
