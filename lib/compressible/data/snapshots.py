"""Snapshots of the hub's repositories, in bounds: their size is asked first, and they do not come for ever.

The hub's own library takes whatever comes for as long as something comes, and cannot be interrupted from within: so
it works in a process of its own, whose files cannot grow beyond what the hub told, and which ends when its time is
over. What it has fetched until then stays in the hub's cache, from where the next call goes on.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from compressible.data.bounds import LARGEST, LEAST_SECONDS, SourceError, bound, command

MOST = LARGEST  # bytes that one snapshot may have to fetch
BESIDE = 64_000_000  # bytes of the library's own notes beside a file
_CALL = """
import json, sys
from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars, logging
disable_progress_bars()
logging.set_verbosity_error()
try:
    found = snapshot_download(**json.loads(sys.argv[1]))
except Exception as error:
    cause = error.__cause__ or error
    sys.exit(" ".join(f"{type(cause).__name__}: {cause}".split()))
if not isinstance(found, str):
    keys = ("filename", "file_size", "will_download", "commit_hash")
    found = [{key: getattr(file, key) for key in keys} for file in found]
with open("found.json", "w") as out:
    json.dump(found, out)
"""


def snapshot(name: str, kind: str, patterns: list[str], ignored: list[str], revision: str | None) -> Path:
    """The folder of the hub's cache with a repository's files of these patterns, fetched where they are not there.

    Args:
        name: owner/name of the repository.
        kind: "model" or "dataset".
        patterns: which files are wanted, as in "*.json".
        ignored: which of them are not.
        revision: a branch, tag or commit; None is the newest.

    Raises:
        SourceError: before anything is fetched, if the files have more than MOST bytes together, or more than the disk
            has room for; if they do not come in time, or are larger than the hub says; or if the hub has none such.
    """
    from huggingface_hub import constants

    asked: dict[str, Any] = {
        "repo_id": name,
        "repo_type": kind,
        "revision": revision,
        "cache_dir": str(constants.HF_HUB_CACHE),
    }
    asked |= {"allow_patterns": patterns, "ignore_patterns": ignored}
    if constants.is_offline_mode():
        return _kept(asked)
    on_line = asked | {"endpoint": constants.ENDPOINT}
    try:
        files = _call(on_line | {"dry_run": True}, BESIDE, LEAST_SECONDS)
    except SourceError as error:  # perhaps there is no network, and no need of one
        try:
            return _kept(asked)
        except Exception:
            raise error from None
    if not files:
        raise SourceError(f"no file like {' or '.join(patterns)} in {name}")
    _fetch(on_line | {"revision": files[0]["commit_hash"]}, [file for file in files if file["will_download"]])
    return _kept(asked)


def _fetch(asked: dict[str, Any], files: list[dict[str, Any]]) -> None:
    """Fetch the files that are not there yet; SourceError before that where they are too large."""
    unknown = [file["filename"] for file in files if file["file_size"] is None]
    if unknown:
        raise SourceError(f"the hub does not say how large {', '.join(unknown[:3])} of {asked['repo_id']} is")
    sizes = {file["filename"]: file["file_size"] for file in files}
    if not (total := sum(sizes.values())):
        return
    largest = max(sizes, key=lambda name: sizes[name])
    told = f"{len(files)} files of {asked['repo_id']} have {total} bytes ({largest} has {sizes[largest]})"
    if total > MOST:
        raise SourceError(f"{told}, expected at most {MOST} bytes")
    if total > (room := _room(Path(asked["cache_dir"]))):
        raise SourceError(f"{told}, and the disk of {asked['cache_dir']} has room for {room}")
    _call(asked, sizes[largest], bound(total).seconds)


def _room(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    return shutil.disk_usage(there).free


def _call(asked: dict[str, Any], largest: int, seconds: float) -> Any:
    """What snapshot_download gives for these arguments, in a process of its own whose files and time are bounded."""
    with tempfile.TemporaryDirectory(prefix="compressible-") as folder:
        call = [sys.executable, "-c", _CALL, json.dumps(asked)]
        failed, told = command(call, largest, seconds, Path(folder), BESIDE)
        if failed:
            raise SourceError(told.strip().rpartition("\n")[2] or f"the hub's library ended with {failed}")
        return json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))


def _kept(asked: dict[str, Any]) -> Path:
    """The folder in the hub's cache; the library's own error where it is not there, or not whole."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(**asked, local_files_only=True))
