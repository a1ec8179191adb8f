"""What tells a run from any other: its function and arguments, the digests of its data, and the key of them all.

The key is the sha256 of: the function's source with what it reads from outside itself (code_digest.py), the parameters,
the library (version and sources that compute), torch, the device, and the data digests. So a colour can change for
free, and nothing that moves a number can.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from compressible.companion import parameters
from compressible.companion.code_digest import source_digest
from compressible.companion.provenance import LIBRARY
from compressible.runtime import checks, devices

Data = Iterable[str] | Mapping[str, str]


def arguments_of(function: Callable[..., dict], values: Mapping[str, Any]) -> dict[str, Any]:
    """Validated arguments of the function, its own defaults included. Raises ParameterError where one is missing."""
    signature = inspect.signature(function).parameters
    names = [name for name, item in signature.items() if item.kind is not item.VAR_KEYWORD]
    defaults = {n: p.default for n, p in signature.items() if p.default is not p.empty}
    given = {name: value for name, value in values.items() if name != "preset" or name in names}
    open_ended = len(names) < len(signature)
    merged = {**defaults, **given}
    ordered = {name: merged[name] for name in names if name in merged}
    checked = parameters.validate({**ordered, **merged}, allowed=None if open_ended else names)
    if missing := [name for name in names if name not in checked]:
        raise parameters.ParameterError(f"{function.__qualname__}: expected a value for {', '.join(missing)}")
    return checked


def digests_of(data: Data) -> dict[str, str]:
    """The digest of each that a run reads, by name. Raises ParameterError for what the data manifest does not have."""
    if isinstance(data, str):
        data = (data,)
    named = dict(data) if isinstance(data, Mapping) else {name: name for name in data}
    return {name: value if _is_digest(value) else _manifest_digest(value) for name, value in named.items()}


def _is_digest(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def _manifest_digest(name: str) -> str:
    from compressible.data import manifest

    entries = manifest.load_manifest()
    if name not in entries:
        raise parameters.ParameterError(
            f"data: got {name!r}, expected a name in the manifest{checks.closest(name, entries)}"
        )
    return entries[name].sha256


def key_of(
    function: Callable[..., dict],
    values: Mapping[str, Any],
    digests: Mapping[str, str],
    reads: Mapping[str, str] | None,
) -> str:
    """The key of a run, under which the cache has it. Raises TypeError when nothing tells a value that is read."""
    from compressible import __version__

    parts = {
        "function": source_digest(function, reads),
        "parameters": values,
        "library": [__version__, LIBRARY],
        "torch": torch.__version__,
        "device": devices.device_name(values.get("device", "cpu")),
        "data": sorted(digests.values()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()
