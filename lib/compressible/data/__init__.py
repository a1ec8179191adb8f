"""Data: files by name, checked against a manifest; ratings and text tasks made of them; pretrained models."""

from compressible.data.manifest import (
    DataError,
    DataSet,
    Entry,
    cached_path,
    fetch,
    fetch_all,
    fetch_first,
    find,
    load_manifest,
    load_sets,
    sha256,
)

__all__ = [
    "DataError",
    "DataSet",
    "Entry",
    "cached_path",
    "fetch",
    "fetch_all",
    "fetch_first",
    "find",
    "load_manifest",
    "load_sets",
    "sha256",
]
