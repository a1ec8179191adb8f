"""Snapshots of the hub are bounded in size and time: by a hub on loopback that speaks the library's own protocol."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from compressible import data
from compressible.data import bounds, hub, pretrained, snapshots, text

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": b"weights " * 1000, "onnx/model.safetensors": b"the same, twice"}


class Hub(BaseHTTPRequestHandler):
    """One repository owner/name: its commit, its list of files with their sizes, and the files."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with suppress(ConnectionError, BrokenPipeError):  # whoever asked has heard enough
            self.respond(self.server.told, self.path.partition("?")[0].strip("/").split("/"))  # type: ignore[attr-defined]

    def respond(self, told: SimpleNamespace, path: list[str]) -> None:
        told.asked.append((self.command, "/".join(path)))
        time.sleep(told.wait)
        if not {"name", "nyu-mll"} & {*path}:
            self.send_error(404)
        elif path[:1] == ["api"] and "tree" in path:
            listed = [
                {"type": "file", "path": name, "size": told.sizes.get(name, len(content)), "oid": digest(content)}
                for name, content in told.files.items()
            ]
            self.answer(json.dumps(listed).encode())
        elif path[:1] == ["api"]:
            self.answer(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())
        elif (name := "/".join(path).rpartition(f"resolve/{COMMIT}/")[2]) in told.files:
            length = told.sizes.get(name) if self.command == "HEAD" else None
            self.answer(told.files[name], told.pause, {"ETag": f'"{digest(told.files[name])}"'}, length)
        else:
            self.send_error(404)

    def answer(
        self, content: bytes, pause: float = 0.0, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(200)
        told = {"Content-Length": str(length or len(content)), "X-Repo-Commit": COMMIT}
        for name, value in {**told, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        for place in range(len(content) if pause and self.command == "GET" else 0):
            self.wfile.write(content[place : place + 1])
            time.sleep(pause)
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub_of(files: dict[str, bytes]):
    http = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    told = http.told = SimpleNamespace(files=dict(files), sizes={}, pause=0.0, wait=0.0, asked=[])  # type: ignore[attr-defined]
    told.url = f"http://127.0.0.1:{http.server_address[1]}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield told
    finally:
        http.shutdown()
        http.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The hub, on-line, and an empty cache."""
    places = ("COMPRESSIBLE_MODELS", "COMPRESSIBLE_DATA", "COMPRESSIBLE_OFFLINE")
    for name in (*places, "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with hub_of(FILES) as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield running


def got(told: SimpleNamespace) -> list[str]:
    """The files that were fetched."""
    return sorted(path.rpartition("/")[2] for method, path in told.asked if method == "GET" and "resolve" in path)


def refused() -> str:
    with pytest.raises(data.DataError) as caught:
        hub.model_folder("owner/name")
    said = str(caught.value)
    assert "cannot get the model 'owner/name'" in said and "what to do: set COMPRESSIBLE_MODELS" in said
    return said


def test_what_forbids_the_network_forbids_the_hub_and_not_its_cache(server, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_OFFLINE", "1")
    assert "not tried, COMPRESSIBLE_OFFLINE is 1" in refused() and not server.asked
    monkeypatch.delenv("COMPRESSIBLE_OFFLINE")
    folder = hub.model_folder("owner/name")
    asked = len(server.asked)
    monkeypatch.setenv("COMPRESSIBLE_OFFLINE", "1")
    assert hub.model_folder("owner/name") == folder and len(server.asked) == asked


@pytest.mark.parametrize("ours", [None, "yes"])
@pytest.mark.parametrize("theirs", [None, "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_the_advice_names_what_forbids_the_network(server, monkeypatch, ours, theirs):
    server.files.clear()
    if ours:
        monkeypatch.setenv("COMPRESSIBLE_OFFLINE", ours)
    if theirs:
        monkeypatch.setenv(theirs, "1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused()
    named = {name: value for name, value in (("COMPRESSIBLE_OFFLINE", ours), (theirs, "1")) if name and value}
    for name in ("COMPRESSIBLE_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        assert (f"without {name}=" in said or f" and {name}=" in said) == (name in named), said
    head, advice = said.partition(", tried:")[0], said.rpartition("what to do:")[2]
    assert all(f"{name} is {value}" in head and f"{name}={value}" in advice for name, value in named.items())
    assert ("(" in head or "(" in advice) == bool(named)


def test_a_snapshot_comes_once_without_the_other_formats_and_serves_off_line_then(server, monkeypatch):
    folder = hub.model_folder("owner/name")
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert files == {name: FILES[name] for name in ("config.json", "model.safetensors")}
    assert got(server) == ["config.json", "model.safetensors"]
    assert hub.model_folder("owner/name") == folder and got(server) == ["config.json", "model.safetensors"]
    server.files["config.json"] = b"{}"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    assert hub.model_folder("owner/name") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.model_folder("owner/name") == folder


def test_a_snapshot_that_is_too_large_is_refused_before_anything_comes(server, monkeypatch):
    server.sizes["model.safetensors"] = 40_000_000_000
    said = refused()
    assert "2 files of owner/name have 40000000002 bytes (model.safetensors has 40000000000)" in said
    assert "expected at most 20000000000 bytes" in said and not got(server)
    monkeypatch.setattr(snapshots, "MOST", 10**18)
    server.sizes["model.safetensors"] = 10**15
    assert "and the disk of" in refused() and not got(server)


def test_a_snapshot_that_comes_byte_by_byte_is_given_up(server, monkeypatch):
    monkeypatch.setattr(bounds, "LEAST_SECONDS", 3)
    server.pause, began = 0.2, time.monotonic()
    assert "took longer than 3 s" in refused()
    assert time.monotonic() - began < 30


def test_a_hub_that_does_not_answer_is_given_up(server, monkeypatch):
    monkeypatch.setattr(snapshots, "LEAST_SECONDS", 2)
    server.wait, began = 8.0, time.monotonic()
    assert "took longer than 2 s" in refused()
    assert time.monotonic() - began < 8


def test_a_file_that_is_larger_than_the_hub_says_does_not_fill_the_disk(server, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "BESIDE", 1_000_000)
    server.files["model.safetensors"], server.sizes["model.safetensors"] = bytes(30_000_000), 1000
    refused()
    assert sum(file.stat().st_size for file in (tmp_path / "hub").rglob("*") if file.is_file()) < 3_000_000


def test_a_name_that_the_hub_does_not_have_says_so_and_proposes_one(server):
    with pytest.raises(data.DataError) as caught:
        pretrained.load_tokenizer("owner/bert-base-casd")
    said = str(caught.value)
    assert "cannot get the model" in said and "Or is it misspelt?" in said and "404" in said


def test_a_model_of_the_hub_is_loaded_from_what_came_in_bounds(server, tmp_path, monkeypatch):
    from text_helpers import save_bert

    made = Path(save_bert(tmp_path / "made"))
    server.files = {file.name: file.read_bytes() for file in made.iterdir()}
    model, tokenizer = pretrained.load_encoder("owner/name", 2)
    assert model.config.num_labels == 2 and len(tokenizer) > 0
    asked = [path for _, path in server.asked]
    assert all(path.startswith("api/") or f"resolve/{COMMIT}/" in path for path in asked), asked
    shutil.rmtree(tmp_path / "hub")
    server.sizes["model.safetensors"] = 30_000_000_000
    with pytest.raises(data.DataError, match="expected at most 20000000000 bytes"):
        pretrained.load_encoder("owner/name", 2)


def test_a_table_that_is_too_large_is_refused_before_anything_comes(server):
    server.files = {"stsb/train-00000-of-00001.parquet": b"never read"}
    server.sizes = {"stsb/train-00000-of-00001.parquet": 30_000_000_000}
    with pytest.raises(data.DataError, match="expected at most 20000000000 bytes") as caught:
        text.read_rows("stsb", "train", "hub")
    assert "set COMPRESSIBLE_DATA" in str(caught.value) and not got(server)
