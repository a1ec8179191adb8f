"""What the Hugging Face hub holds: tables as parquet files, kept quiet, and errors that say what to do without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from compressible.data.bounds import SourceError, is_offline
from compressible.data.manifest import DataError, fetch_all, load_manifest, sha256
from compressible.data.snapshots import snapshot
from compressible.runtime.checks import one_line

MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")  # weights, settings, tokenizers
TOKENIZERS = ("*.jinja", "*.tiktoken", "*.spm", "*.codes")  # more of what tokenizers are read from
BELOW = ["*/*"]  # other formats and sizes of the same model, in folders of its repository, are not read


def find_model(name: str) -> str:
    """The folder of a model, fetched and checked if the manifest has it ("minilm"), or the name itself, for the hub."""
    if folder := _placed(name):
        return str(folder)
    if not (entries := _entries(name)):
        return name
    folders = {path.parent for path in fetch_all(entries)}
    if len(folders) > 1:
        places = " and ".join(sorted(map(str, folders)))
        raise DataError(f"the files of {name} lie in {places}: put all of {', '.join(entries)} into one folder")
    return str(folders.pop())


def model_digests(name: str) -> dict[str, str]:
    """sha256 by "name/file" of what a model is read from: the manifest's, or else of the files themselves."""
    own, folder = _entries(name), _placed(name)
    if own and not folder:
        return own
    folder = folder or model_folder(name)
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    return {f"{name}/{file.name}": sha256(file) for file in files}


def _entries(name: str) -> dict[str, str]:
    """The manifest's files of a model, with their digests."""
    return {file: entry.sha256 for file, entry in load_manifest().items() if file.startswith(f"{name}/")}


def _placed(name: str) -> Path | None:
    """A model's folder below COMPRESSIBLE_MODELS, or the folder that the name itself is; the manifest's names go on."""
    below = os.environ.get("COMPRESSIBLE_MODELS")
    places = [Path(below).expanduser() / name] if below else []
    places += [] if _entries(name) else [Path(name).expanduser()]
    return next((folder for folder in places if folder.is_dir()), None)


def read_table(
    repository: str, config: str, split: str, columns: list[str], revision: str | None = None
) -> pd.DataFrame:
    """The columns of one split of a data set that the hub keeps as parquet files, or the hub's cache does.

    Both of the hub's layouts are read, `config/split-00000-of-00001.parquet` and `config/split/0000.parquet`;
    scripts are never run. Raises DataError if there are no such files, or no reader for them.
    """
    files = table_files(repository, config, split, revision)
    try:
        return pd.concat([pd.read_parquet(file, columns=columns) for file in files], ignore_index=True)
    except ImportError:
        raise DataError("pyarrow is not installed: pip install 'compressible-dynamics[adapters]'") from None
    except Exception as error:  # a damaged file, a column that is not there: each with exceptions of its own
        tried = [f"the hub: {one_line(error)}"]
        raise DataError(failure(_named(repository, config, split), tried, "COMPRESSIBLE_DATA")) from error


def table_files(repository: str, config: str, split: str, revision: str | None = None) -> list[Path]:
    """The parquet files of one split of a data set, fetched into the hub's cache; DataError if there are none."""
    patterns = [f"{config}/{split}-*.parquet", f"{config}/{split}/*.parquet"]
    place = _named(repository, config, split)
    kept = _snapshot(repository, "dataset", patterns, revision, place, "COMPRESSIBLE_DATA")
    files = sorted(file for pattern in patterns for file in kept.glob(pattern))
    if not files:
        tried = [f"the hub: no file like {' or '.join(patterns)}"]
        raise DataError(failure(place, tried, "COMPRESSIBLE_DATA"))
    return files


def model_folder(name: str) -> Path:
    """The folder in the hub's cache with a model's MODEL_FILES, fetched if need be; DataError if not to be had."""
    return _snapshot(name, "model", [*MODEL_FILES], None, f"model {name!r}", "COMPRESSIBLE_MODELS")


def place_of(name: str) -> str:
    """Where transformers finds a model: a folder as it is, and of a name on the hub the folder of its files, in bounds.

    Off-line the name itself, since nothing comes then. Raises SourceError, or an error of the hub's, if the hub does
    not give the files.
    """
    from huggingface_hub import constants

    if Path(name).is_dir() or constants.is_offline_mode():
        return name
    return str(snapshot(name, "model", [*MODEL_FILES, *TOKENIZERS], BELOW, None))


def _snapshot(name: str, kind: str, patterns: list[str], revision: str | None, what: str, variable: str) -> Path:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise DataError(f"{error.name} is not installed: pip install 'compressible-dynamics[adapters]'") from None
    try:
        with quiet():
            return snapshot(name, kind, patterns, BELOW if kind == "model" else [], revision)
    except Exception as error:  # network, permission, cache: each with exceptions of its own
        told = str(error) if isinstance(error, SourceError) else one_line(error)
        raise DataError(failure(what, [f"the hub: {told}"], variable)) from error


def _named(repository: str, config: str, split: str) -> str:
    return f"data set {repository} ({config}, {split})"


@contextmanager
def quiet() -> Iterator[None]:
    """Load without progress bars and without the note that the head is new, which is always so here."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    bars, shown, level = hub.are_progress_bars_disabled(), logging.is_progress_bar_enabled(), logging.get_verbosity()
    hub.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
        if not bars:
            hub.enable_progress_bars()


def failure(what: str, tried: list[str], variable: str) -> str:
    """What could not be had, everything that was tried, and what to do; `variable` names the local folder's."""
    forbidding = _forbidding()
    offline = f" ({' and '.join(f'{name} is {value}' for name, value in forbidding.items())}, so only its cache)"
    without = f" (without {' and '.join(f'{name}={value}' for name, value in forbidding.items())})"
    if not forbidding:
        offline = without = ""
    lines = [f"cannot get the {what}{offline}, tried:", *(f"  - {reason}" for reason in tried)]
    lines.append(f"what to do: set {variable} to a folder that holds it, or go on-line and run again{without};")
    return "\n".join([*lines, "once fetched, the hub's cache serves it off-line."])


def _forbidding() -> dict[str, str]:
    """The variables that forbid the network, with their values: ours, and of the hub's two the one that it heeds."""
    from huggingface_hub import constants

    names = ["COMPRESSIBLE_OFFLINE"] if is_offline() else []
    if constants.is_offline_mode():  # as it was when the hub's library was imported
        only_theirs = "TRANSFORMERS_OFFLINE" in os.environ and not os.environ.get("HF_HUB_OFFLINE")
        names.append("TRANSFORMERS_OFFLINE" if only_theirs else "HF_HUB_OFFLINE")
    return {name: os.environ.get(name) or "1" for name in names}
