"""The pinned environments, files constraints*.txt of exact versions, and which of them the installed packages are.

A file is that of an environment where every package that both have is of one version, and every package by which a
number may change (provenance.PACKAGES) is in it. Packages that an installation leaves out differ in nothing. A local
part of a version ("+cpu", "+cu130") counts where the file names one: PyTorch's builds differ in nothing else.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import Version

from compressible.runtime import paths

OURS = canonicalize_name(paths.PROJECT)
_PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;#]+)", re.M)


def installed() -> dict[str, str]:
    """Version of each package that Python finds, by its name; of two copies that which it imports."""
    folders = [Path(place) for place in sys.path]
    return dict(_installed(tuple((place, place.stat().st_mtime_ns if place.exists() else 0) for place in folders)))


@lru_cache(1)
def _installed(folders: tuple[tuple[Path, int], ...]) -> dict[str, str]:
    """What is found in these folders since they last changed, as they do by an installation; each run asks for it."""
    found: dict[str, str] = {}
    for package in metadata.distributions():
        if (name := package.metadata["Name"]) and canonicalize_name(name) != OURS:
            found.setdefault(canonicalize_name(name), package.version)
    return found


def read(path: Path) -> dict[str, str]:
    """Versions of a file of pins, as `pip freeze` writes it, by name."""
    return {canonicalize_name(name): version for name, version in _PIN.findall(path.read_text(encoding="utf-8"))}


def written(packages: Mapping[str, str]) -> str:
    """The lines of a file of pins."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(packages.items()))


def differences(pinned: Mapping[str, str], found: Mapping[str, str], needed: Iterable[str] = ()) -> list[str]:
    """In which packages what is installed is not what is pinned; `needed` are those that must be pinned.

    Example:
        >>> differences({"torch": "2.13.0", "peft": "0.21"}, {"torch": "2.13.0+cpu", "numpy": "2.5"}, ["numpy"])
        ['numpy 2.5 is not pinned']
    """
    both = sorted(pinned.keys() & found.keys())
    other = [f"{name} {found[name]}, pinned {pinned[name]}" for name in both if not _same(pinned[name], found[name])]
    return other + [f"{name} {found[name]} is not pinned" for name in needed if name in found.keys() - pinned.keys()]


def _same(pinned: str, found: str) -> bool:
    want, have = Version(pinned), Version(found)
    return want == have if want.local else want.public == have.public


def files(root: Path | None = None) -> list[Path]:
    """The files of pins of this checkout, sorted; none outside of one."""
    try:
        return sorted((paths.repository() if root is None else root).glob("constraints*.txt"))
    except FileNotFoundError:
        return []


def state(needed: Iterable[str]) -> dict[str, Any]:
    """What is installed, against the pinned environments of this checkout, as records keep it.

    Returns:
        `installed`, the sha256 of all names and versions; `pinned`, the name of the file that they are, or None;
        `sha256` of that file; `differs`, the differences from the nearest file where they are none's.
    """
    found, wanted = installed(), [canonicalize_name(name) for name in needed]
    told: dict[str, Any] = {"installed": sha256(written(found).encode()), "pinned": None, "sha256": None, "differs": []}
    by_file = {file: differences(read(file), found, wanted) for file in files()}
    if not by_file:
        return told
    nearest = min(by_file, key=lambda file: (len(by_file[file]), -len(read(file).keys() & found.keys())))
    if by_file[nearest]:
        return told | {"differs": [f"{nearest.name}: {each}" for each in by_file[nearest]]}
    return told | {"pinned": nearest.name, "sha256": sha256(nearest.read_bytes())}


def sha256(content: bytes) -> str:
    """The digest of bytes in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
