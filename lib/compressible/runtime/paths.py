"""Where things live: repository, cache, figures; variables that say so; and writing that is never half done."""

from __future__ import annotations

import os
import re
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from compressible.runtime import process_identity

PROJECT = "compressible-dynamics"
PLACES = (
    *(f"COMPRESSIBLE_{name}" for name in ("DATA", "CACHE", "FIGURES", "MANIFEST", "MODELS")),
    *("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE", "HF_TOKEN_PATH"),  # of the hub
    *("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR", "MPLCONFIGDIR", "NUMBA_CACHE_DIR"),
    *("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR"),
    *("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"),
)
HALF_WRITTEN = re.compile(rf"\..*\.({process_identity.PATTERN})-[0-9a-f]{{12}}(?:\.[^.]*)?")


def repository() -> Path:
    """Folder of the checkout, looked for upwards from the working directory, then from this file.

    Raises FileNotFoundError when neither lies inside a checkout.
    """
    starts = (Path.cwd(), Path(__file__).resolve().parent)
    for start in starts:
        for folder in (start, *start.parents):
            if _is_project(folder / "pyproject.toml"):
                return folder
    looked = " and ".join(str(start) for start in starts)
    raise FileNotFoundError(f"no pyproject.toml of {PROJECT!r} at or above {looked}: run inside a checkout")


def cache_dir() -> Path:
    """Directory for downloads and results: $COMPRESSIBLE_CACHE, or the platform's cache directory."""
    named = os.environ.get("COMPRESSIBLE_CACHE")
    if named:
        return Path(named).expanduser()
    import platformdirs  # not needed where nothing is cached: a GPU host may have PyTorch alone

    return Path(platformdirs.user_cache_dir("compressible"))


def figures_dir() -> Path:
    """Root of the figures: $COMPRESSIBLE_FIGURES, or `figures` in the repository."""
    named = os.environ.get("COMPRESSIBLE_FIGURES")
    return Path(named).expanduser() if named else repository() / "figures"


def absolute_places() -> dict[str, str]:
    """The environment's variables that name places, made absolute from the working directory; those not set are left.

    A kernel starts in its notebook's folder, where a relative path would mean another place.
    """
    named = {name: os.environ[name] for name in PLACES if os.environ.get(name)}
    absolute = {name: os.path.abspath(os.path.expanduser(value)) for name, value in named.items()}
    if searched := os.environ.get("PYTHONPATH"):
        absolute["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, searched.split(os.pathsep)))
    return absolute


def unwritable(folder: str | os.PathLike[str]) -> str:
    """Why no file can be written in `folder`, which is made where it is not there; "" where one can."""
    probe = _temporary(Path(folder) / "probe")
    try:
        write_atomic(probe, bytes(4096))  # an empty file would still find room on a full disk
        probe.unlink(missing_ok=True)
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror or error}"
    return ""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    The temporary name keeps the suffix, since many writers choose their format by it, and says whose it is: a process
    that is killed cannot remove it, and the next one that writes in the folder does. Raises FileNotFoundError when the
    block wrote nothing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _forget_dead(os.path.abspath(path.parent), os.getpid())
    temporary = _temporary(path)
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write bytes, or text as UTF-8, so that a reader sees the old file or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def _temporary(path: Path) -> Path:
    name = f".{path.stem[:40]}.{process_identity.identity()}-{uuid.uuid4().hex[:12]}"
    return path.with_name(f"{name}{path.suffix}")


@cache  # it lists all names: in a folder of thousands of results that takes as long as writing one
def _forget_dead(folder: str, pid: int) -> None:
    """Remove, once a process, what writers in `folder` left half written that were of this system and are no more."""
    with suppress(OSError):
        for name in os.listdir(folder):
            writer = HALF_WRITTEN.fullmatch(name)
            if writer and process_identity.is_gone(writer[1]):
                with suppress(OSError):  # one that is another user's, say: the next one may be ours
                    os.unlink(os.path.join(folder, name))


def _is_project(file: Path) -> bool:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")).get("project", {}).get("name") == PROJECT
    except (OSError, ValueError):
        return False


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


@contextmanager
def variables_set(**values: str) -> Iterator[None]:
    """Set variables of this process's environment for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
