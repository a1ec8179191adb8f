"""A local web server, small packages and a small rating set, for the tests of data and ratings."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from compressible.data.ratings import Offsets, Ratings


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_manifest(path: Path, files: dict[str, tuple[bytes, list[str]]], sets: dict | None = None) -> Path:
    """The manifest from here on: files {name: (content, sources)}, sets {name: {rows, users, items, sha256}}."""
    terms = {"licence": "none", "citation": "nobody"}
    tables = [("sets", name, values | terms) for name, values in (sets or {}).items()]
    for name, (content, sources) in files.items():
        values = {"sha256": digest(content), "size": len(content), "sources": sources, "description": "test"}
        tables.append(("files", name, values | terms))
    lines = []
    for kind, name, values in tables:
        lines += [f"[{kind}.{json.dumps(name)}]", *(f"{key} = {json.dumps(v)}" for key, v in values.items())]
    path.write_text("\n".join(lines) + "\n")
    os.environ["COMPRESSIBLE_MANIFEST"] = str(path)
    return path


def write_wordnet(folder: Path, words: int = 300) -> Path:
    """A manifest of files as WordNet has them, beside these: nouns, of which every third is a verb, too."""
    kinds = ("round", "flat", "small", "red", "cold", "loud", "old")
    places = ("the sea", "a house", "the wood", "a town")
    names = ["".join(chr(97 + at // 17**place % 17) for place in range(3)) + "er" for at in range(words)]
    told = [f"a {kinds[at % 7]} thing that is found in {places[at % 4]}" for at in range(words)]
    lines = {part: ["  1 the licence\n"] for part in ("noun", "verb", "adj", "adv")}
    for at, (name, gloss) in enumerate(zip(names, told, strict=True)):
        lines["noun"].append(f'{at:08d} 06 n 02 {name} 0 other 0 001 @ 00000000 n 0000 | {gloss}; "an example"  \n')
        if at % 3 == 0:
            lines["verb"].append(f"{at:08d} 31 v 01 {name} 0 000 01 + 02 00 | make {kinds[at % 7]}  \n")
    lines["noun"] += [f"00000900 06 n 01 {name} 0 000 | not taken  \n" for name in ("Proper", "two_words", "aren't")]
    lines["noun"].append(f"00000901 06 n 01 {names[0]} 0 000 | another meaning of it  \n")
    lines["noun"].append(f"00000902 06 n 01 {names[1]} 0 000 | {'very ' * 20} long  \n")
    lines["adj"].append("00000903 00 s 01 placed(a) 0 000 | standing before its noun  \n")
    files = {f"wordnet/data.{part}": "".join(of).encode() for part, of in lines.items()}
    (folder / "wordnet").mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return write_manifest(folder / "manifest.toml", {name: (content, []) for name, content in files.items()})


class Server:
    """What the web server serves, and what it was asked for."""

    def __init__(self, url: str) -> None:
        self.url, self.files, self.requests = url, {}, []
        self.cut = 0  # this many requests get half of the file and then a closed connection
        self.half_sent, self.hang = threading.Event(), None  # hang: an event to wait for after the first half
        self.pause = 0.0  # seconds between two bytes of a file
        self.told = True  # whether the length is said before the content

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.lstrip("/")
        self.requests.append(name)
        if name not in self.files:
            handler.send_error(404)
            return
        content = self.files[name]
        handler.send_response(200)
        if self.told:
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        for place in range(len(content) if self.pause else 0):
            handler.wfile.write(content[place : place + 1])
            time.sleep(self.pause)
        half, self.cut = self.cut > 0 or self.hang is not None, max(self.cut - 1, 0)
        handler.wfile.write(content[: len(content) // 2] if half else content)
        handler.wfile.flush()
        if self.hang is not None:
            self.half_sent.set()
            self.hang.wait(60)


@contextmanager
def serving():
    """A web server on 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(ConnectionError):  # whoever asked has heard enough
                server.respond(self)

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        if server.hang is not None:
            server.hang.set()
        http.shutdown()
        http.server_close()


def write_wheel(folder: Path, package: str, members: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, version 1.0."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{package}-1.0.dist-info"
    content = members | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    content[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*content, f"{info}/RECORD"]).encode()
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    return path


BACKEND = """
import os
def prepare_metadata_for_build_wheel(directory, settings=None):
    info = os.path.join(directory, "NAME-1.0.dist-info")
    os.makedirs(info)
    with open(os.path.join(info, "METADATA"), "w") as out:
        out.write("Metadata-Version: 2.1\\nName: NAME\\nVersion: 1.0\\n")
    return "NAME-1.0.dist-info"
"""


def write_sdist(folder: Path, package: str, members: dict[str, bytes]) -> Path:
    """A source archive with its own build backend, so that pip needs nothing else to look at it."""
    folder.mkdir(parents=True, exist_ok=True)
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    project += f'[project]\nname = "{package}"\nversion = "1.0"\n'
    own = {
        "pyproject.toml": project.encode(),
        "backend.py": BACKEND.replace("NAME", package).encode(),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
    }
    path = folder / f"{package}-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (members | own).items():
            item = tarfile.TarInfo(f"{package}-1.0/{name}")
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
    return path


def write_tool(path: Path, script: str) -> None:
    """A program of that name: a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)


def write_deb(path: Path, members: dict[str, bytes]) -> Path:
    """A Debian package that dpkg-deb can read: an ar archive of a version, a control and a data archive."""
    control = b"Package: tinyset\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <no@body>\nDescription: test\n"
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": _tar({"./control": control}),
        "data.tar.gz": _tar({f"./{name}": content for name, content in members.items()}),
    }
    with path.open("wb") as out:
        out.write(b"!<arch>\n")
        for name, content in parts.items():
            out.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            out.write(content + b"\n" * (len(content) % 2))
    return path


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
    return buffer.getvalue()


COLUMNS = ["user_id", "item_id", "rating", "timestamp"]


def small_table(seed: int = 0) -> pd.DataFrame:
    """120 ratings of 12 users and 20 items, with gaps in the ids, in no order."""
    rng = np.random.default_rng(seed)
    cells = rng.permutation(12 * 20)[:120]
    rows = {"user_id": cells // 20 * 3 + 1, "item_id": cells % 20 * 7 + 2, "rating": rng.integers(1, 6, 120)}
    return pd.DataFrame(rows | {"timestamp": 880_000_000 + rng.permutation(120)}).astype("int64")


def set_facts(table: pd.DataFrame) -> dict:
    """The manifest's facts about a table, worked out independently of the library."""
    rows = sorted(tuple(int(value) for value in row) for row in table[["user_id", "item_id", "timestamp"]].values)
    stars = {(u, i): int(r) for u, i, r in table[["user_id", "item_id", "rating"]].values}
    raw = b"".join(b"".join(int(value).to_bytes(8, "little") for value in (u, i, stars[u, i], t)) for u, i, t in rows)
    users, items = table["user_id"].nunique(), table["item_id"].nunique()
    return {"rows": len(table), "users": int(users), "items": int(items), "sha256": digest(raw)}


def as_text(table: pd.DataFrame, header: bool = False) -> bytes:
    return table.to_csv(sep="\t", index=False, header=header).encode()


def as_archive(table: pd.DataFrame, folds: dict[str, tuple[pd.DataFrame, pd.DataFrame]]) -> bytes:
    """The layout of GroupLens' ml-100k.zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ml-100k/u.data", as_text(table))
        for name, (train, test) in folds.items():
            archive.writestr(f"ml-100k/{name}.base", as_text(train))
            archive.writestr(f"ml-100k/{name}.test", as_text(test))
    return buffer.getvalue()


def as_inter(table: pd.DataFrame) -> bytes:
    """The layout of the copy in the recbole package."""
    names = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
    return as_text(table.set_axis(names, axis=1), header=True)


def rating_matrix(ratings: Ratings, index: np.ndarray) -> tuple[Tensor, Tensor]:
    """(target, mask), both (m, n): the indexed ratings and 1 there; else 0."""
    target, mask = (torch.zeros(ratings.shape, dtype=torch.float64) for _ in range(2))
    target[ratings.users[index], ratings.items[index]] = torch.from_numpy(ratings.ratings[index])
    mask[ratings.users[index], ratings.items[index]] = 1.0
    return target, mask


def offset_matrix(offsets: Offsets) -> np.ndarray:
    """Offsets of all pairs, (m, n)."""
    return offsets.at(*np.ogrid[: len(offsets.user), : len(offsets.item)])
