"""What the data manifest says, checked: its files, sets, terms and joined files.

It is manifest.toml, which lies beside this module, or the file that COMPRESSIBLE_MANIFEST names.
"""

from __future__ import annotations

import os
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, PositiveInt, ValidationError, model_validator

from compressible.data.joined import PREFIX, Digest, Joined, Source, joined_name
from compressible.runtime.checks import mistake, requirement, unknown

# Every part of a name begins with a letter, a digit or a dash: so none is "..", and the whole is a relative path.
Name = Annotated[str, Field(pattern=r"^[\w-][\w .-]*(/[\w-][\w .-]*)*$")]


class DataError(RuntimeError):
    """A data file, or the manifest that describes it, is missing, unreachable or not what it should be."""


class Terms(BaseModel, strict=True, extra="forbid", frozen=True):
    """On what terms files may be used, and what to cite.

    accept: the word by which COMPRESSIBLE_ACCEPT says that a user agrees to the terms at `address`, where they ask it.
    """

    licence: str
    citation: str
    accept: Annotated[str, Field(pattern="^[a-z0-9-]*$")] = ""
    address: str = ""


class Entry(Terms, frozen=True):
    """One data file: its name below a data folder, sha256, size in bytes, terms of use, sources (or none).

    reader: what reads it right, as pip has it, where other versions of that package read something else.
    """

    name: Name
    sha256: Digest
    size: PositiveInt
    description: str
    reader: Annotated[str, AfterValidator(requirement)] = ""
    sources: Annotated[tuple[Source, ...], Field(strict=False)] = ()


class DataSet(Terms, frozen=True):
    """What the files of one set must amount to: rows, users, items and the sha256 of the rows ("" if unknown)."""

    name: str
    rows: PositiveInt
    users: PositiveInt
    items: PositiveInt
    sha256: Digest | Literal[""] = ""


class _Manifest(BaseModel, extra="forbid"):
    sets: dict[str, DataSet]
    terms: dict[str, Terms]
    joined: dict[str, Joined]
    files: dict[str, Entry]

    @model_validator(mode="after")
    def _joined_known(self) -> _Manifest:
        for entry in self.files.values():
            for source in entry.sources:
                if source.startswith(PREFIX) and joined_name(source) not in self.joined:
                    raise ValueError(f"{entry.name}: {unknown('joined file', joined_name(source), self.joined)}")
        return self


class _Written(BaseModel, extra="forbid"):
    """The tables of a manifest as they are written."""

    sets: dict[str, dict[str, Any]] = {}
    terms: dict[str, dict[str, Any]] = {}
    joined: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, Any]] = {}

    def complete(self) -> _Manifest:
        """Every table has its name, a file the terms of the set, or of the terms, that its folder names."""
        kept = {name: {key: of[key] for key in Terms.model_fields if key in of} for name, of in self.sets.items()}
        owners = self.terms | kept
        sets = {name: {"name": name} | table for name, table in self.sets.items()}
        files = {
            name: {"name": name} | owners.get(name.partition("/")[0], {}) | table for name, table in self.files.items()
        }
        tables = {"sets": sets, "terms": self.terms, "joined": self.joined, "files": files}
        return _Manifest.model_validate(tables)


def load_manifest() -> dict[str, Entry]:
    """Entries of the manifest by name; DataError if it is not valid."""
    return _read().files


def load_sets() -> dict[str, DataSet]:
    """Data sets of the manifest by name; DataError if it is not valid."""
    return _read().sets


def load_joined() -> dict[str, Joined]:
    """Joined files of the manifest by name; DataError if it is not valid."""
    return _read().joined


def _read() -> _Manifest:
    named = os.environ.get("COMPRESSIBLE_MANIFEST")
    file = Path(named).expanduser() if named else resources.files("compressible.data") / "manifest.toml"
    try:
        return _Written(**tomllib.loads(file.read_text(encoding="utf-8"))).complete()
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"cannot read the data manifest {file}: {error}") from error
    except ValidationError as error:
        raise DataError(f"data manifest {file}: {'; '.join(map(mistake, error.errors()))}") from None
