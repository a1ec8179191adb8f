"""Downloads end: neither an endless file nor a slow one goes on for ever, whatever kind of source it comes from."""

from __future__ import annotations

import gzip
import shutil
import sys
import time

import pytest
from data_helpers import serving, write_manifest, write_wheel

from compressible import data
from compressible.data import bounds, sources

CONTENT = b"expected " * 1000
NAME = "set/file.bin"


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    for name in ("COMPRESSIBLE_DATA", "COMPRESSIBLE_OFFLINE", "PIP_NO_BINARY", "PIP_ONLY_BINARY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server():
    with serving() as running:
        yield running


def refused(tmp_path, *places: str) -> str:
    """What fetching a file of CONTENT's size from these sources is refused with; nothing of it is kept."""
    write_manifest(tmp_path / "manifest.toml", {NAME: (CONTENT, list(places))})
    with pytest.raises(data.DataError) as caught:
        data.fetch(NAME)
    assert not [file for file in (tmp_path / "cache").rglob("file*") if file.suffix != ".lock"]
    return str(caught.value)


@pytest.mark.parametrize("told", [True, False])
def test_a_file_that_is_larger_than_the_manifest_says_is_not_downloaded_to_its_end(tmp_path, server, told):
    server.files["big"], server.told = bytes(200_000_000), told
    began = time.monotonic()
    said = refused(tmp_path, f"{server.url}/big")
    assert ("the server offers 200000000 bytes, expected 9000" if told else "more than the 9000 bytes") in said
    assert time.monotonic() - began < 5


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(tmp_path, server, monkeypatch):
    monkeypatch.setattr(bounds, "LEAST_SECONDS", 1)
    server.files["slow"], server.pause = CONTENT, 0.05
    began = time.monotonic()
    assert f"bytes in 1 s, expected {len(CONTENT)} bytes by then" in refused(tmp_path, f"{server.url}/slow")
    assert time.monotonic() - began < 5


def test_a_small_file_that_unpacks_without_end_is_not_unpacked(tmp_path, server):
    server.files["bomb"] = gzip.compress(bytes(9_000_000))  # less than 9000 bytes
    assert len(server.files["bomb"]) < len(CONTENT)
    assert "more than the 9000 bytes that were expected" in refused(tmp_path, f"gz+{server.url}/bomb")


def test_a_file_that_was_packed_for_the_way_and_an_incompressible_gzip_are_within_the_bound(tmp_path, server):
    noise = bytes((k * k * 31 + k // 7) % 251 for k in range(5000))
    server.files["noise.gz"] = gzip.compress(noise, compresslevel=0)
    assert len(server.files["noise.gz"]) > len(noise)
    write_manifest(tmp_path / "manifest.toml", {NAME: (noise, [f"gz+{server.url}/noise.gz"])})
    assert data.fetch(NAME).read_bytes() == noise


def test_a_member_that_is_larger_than_the_manifest_says_is_not_taken_whole(tmp_path, monkeypatch):
    write_wheel(tmp_path / "packages", "tinyset", {"tinyset/data/file.bin": bytes(50_000_000)})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert "more than the 9000 bytes" in refused(tmp_path, "pip:tinyset==1.0#tinyset/data/file.bin")


def test_a_program_that_downloads_too_much_or_for_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "BESIDE", 1_000_000)
    writes = f"open({str(tmp_path / 'archive')!r}, 'wb').write(bytes(30_000_000))"
    failed, told = bounds.command([sys.executable, "-c", f"import time; time.sleep(.5); {writes}"], 1000, 60)
    if sys.platform == "linux":
        assert failed and "File too large" in told
        assert (tmp_path / "archive").stat().st_size <= 1_002_000
    with pytest.raises(bounds.SourceError, match="took longer than 1 s"):
        bounds.command([sys.executable, "-c", "import time; time.sleep(60)"], 1000, 1)


def test_a_file_of_the_hub_is_bounded_as_any_other(tmp_path, server, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(sources, "bound", lambda size: bounds.bound(size, 5))
    server.files["owner/name/resolve/main/file.bin"] = CONTENT
    write_manifest(tmp_path / "manifest.toml", {NAME: (CONTENT, ["hf:owner/name@main#file.bin"])})
    assert data.fetch(NAME).read_bytes() == CONTENT
    shutil.rmtree(tmp_path / "cache")
    server.files["owner/name/resolve/main/file.bin"] = bytes(50_000_000)
    assert "the server offers 50000000 bytes" in refused(tmp_path, "hf:owner/name@main#file.bin")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert "HF_HUB_OFFLINE is 1" in refused(tmp_path, "hf:owner/name@main#file.bin") and not server.requests
