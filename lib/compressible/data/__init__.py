from compressible.data.manifest import (
    LOCK_SECONDS,
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
    "LOCK_SECONDS",
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
