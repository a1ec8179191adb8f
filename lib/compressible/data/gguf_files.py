"""Models that come as one GGUF file: its numbers are widened once, and kept as safetensors in the cache.

transformers reads such a file, but it walks through the file's vocabulary piece by piece three times, a minute and
more for 262,144 word pieces; what is kept is read in a second. It is a folder as the hub has them, with the sha256 of
each of its files, which are compared whenever the model is read. Its name has the version of transformers, so that what
a model reads depends on the version that is installed alone, not on the one that came first: versions differ in it. A
tokenizer that lost its merges on the way is not kept.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import torch

from compressible.data import hub
from compressible.data.manifest import DataError, sha256
from compressible.data.word_pieces import expect_words
from compressible.runtime.checks import one_line
from compressible.runtime.paths import cache_dir, unwritable, write_atomic

LOCK_SECONDS = 900
CONTENTS = "contents.json"  # sha256 by file


def readable(place: str) -> str:
    """The place as it is, or, of a folder with nothing but a GGUF file for a model, the one in the cache made from it.

    Raises DataError where there are several such files, transformers cannot read the file, or loses its merges by it.
    """
    folder = Path(place)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return place
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        found = ", ".join(file.name for file in files)
        raise DataError(f"{folder} holds {found}, expected one GGUF file, or a model's config.json")
    return str(_widened(files[0])) if files else place


def _widened(file: Path) -> Path:
    kept = cache_dir() / "widened" / f"{sha256(file)[:16]}-transformers-{version('transformers')}"
    if reason := unwritable(kept.parent):
        if _is_whole(kept):
            return kept
        told = f"{file.name} is widened once, into {kept.parent}, which cannot be written ({reason})"
        raise DataError(f"{told}: COMPRESSIBLE_CACHE names another folder")
    with filelock.FileLock(f"{kept}.lock", timeout=LOCK_SECONDS):
        if not _is_whole(kept):
            shutil.rmtree(kept, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as place:
                _write(file, Path(place) / "model")
                os.replace(Path(place) / "model", kept)
    return kept


def _is_whole(folder: Path) -> bool:
    try:
        contents = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        return all(sha256(folder / name) == digest for name, digest in contents.items())
    except (OSError, ValueError, AttributeError):
        return False


def _write(file: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as the hub has them."""
    given: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with hub.quiet(), torch.random.fork_rng(devices=[]):
            AutoTokenizer.from_pretrained(**given).save_pretrained(folder)
            expect_words(AutoTokenizer.from_pretrained(folder))  # as it will be read: merges are lost on the way
            _unquantised(AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)).save_pretrained(folder)
    except ImportError as error:
        wanted = "pip install 'compressible-dynamics[adapters]', which has the package gguf"
        raise DataError(f"cannot read {file.name}: {one_line(error)}; what to do: {wanted}") from error
    except DataError:
        raise
    except Exception as error:  # a damaged file, a model that transformers does not know: each with its own
        raise DataError(f"cannot read {file}: {one_line(error)}") from error
    digests = {part.name: sha256(part) for part in sorted(folder.iterdir())}
    write_atomic(folder / CONTENTS, json.dumps(digests, indent=1))


def _unquantised(model: Any) -> Any:
    """The same model, of which transformers forgets that it was read from few bits, since it saves no such model."""
    del model.config.quantization_config
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.generation_config = model.generation_config
    return plain
