"""Rows of the text tasks: GLUE and E2E from local tables or the hub, rated sentences and WordNet from packages.

A row is a tuple of texts (a sentence, or a pair) and a label: a float, a class in GLUE's order, or for generation the
text to write. Local files have the sha256 of manifest.toml; the hub's must have the published number of rows.
"""

from __future__ import annotations

import functools
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from compressible.data import hub
from compressible.data.glosses import FILES, glosses
from compressible.data.manifest import DataError, fetch, find, load_manifest, sha256
from compressible.runtime import checks

SPLITS = ("train", "validation")
SOURCES = ("auto", "local", "hub")
RATED = "vader/hutto_ICWSM_2014.tar.gz"
HELD_OUT = 0.2  # of the rated sentences' groups


class Rows(NamedTuple):
    """N rows: their texts, their labels, and the file or data set that they came from."""

    texts: list[tuple[str, ...]]
    labels: list
    source: str


@dataclass(frozen=True)
class TextSet:
    """What a task's rows are: columns of text, label, kind, metric, and where local and hub copies keep them.

    `sizes` are the published numbers of training and validation rows (0: not known);
    some local copies hold fewer.
    """

    texts: tuple[str, ...]
    sizes: tuple[int, int]
    kind: str = "classification"
    metric: str = "accuracy"
    outputs: int = 2
    label: str = "label"
    folder: str = ""
    repository: str = ""
    config: str = ""
    revision: str | None = None
    validation: str = "validation"
    renamed: tuple[tuple[str, str], ...] = ()  # (local column, hub column)


def _glue(config: str, texts: tuple[str, ...], sizes: tuple[int, int], **others: Any) -> TextSet:
    return TextSet(texts, sizes, folder=f"glue-{config}", repository="nyu-mll/glue", config=config, **others)


def _rated(stem: str) -> TextSet:
    return TextSet(("text",), (0, 0), "regression", "pearson", 1, label="rating", folder=stem)


PAIR = ("sentence1", "sentence2")
SETS = {
    "stsb": _glue(
        "stsb", PAIR, (5749, 1500), kind="regression", metric="pearson", outputs=1, label="score",
        renamed=(("score", "label"),),
    ),
    "cola": _glue("cola", ("sentence",), (8551, 1043), metric="matthews"),
    "sst2": _glue("sst2", ("sentence",), (67349, 872)),
    "mrpc": _glue("mrpc", PAIR, (3668, 408)),
    "rte": _glue("rte", PAIR, (2490, 277)),
    "qnli": _glue("qnli", ("question", "sentence"), (104743, 5463)),
    "mnli": _glue("mnli", ("premise", "hypothesis"), (392702, 9815), outputs=3, validation="validation_matched"),
    "qqp": _glue("qqp", ("question1", "question2"), (363846, 40430)),
    # GEM's files are a script, and the hub's converted copy holds the same rows: those of the cleaned E2E, which are
    # fewer than the original's in the local folder, so that no size is asked for.
    "e2e": TextSet(
        ("mr",), (0, 0), "generation", "bleu", 0, "ref", "e2e-nlg", "GEM/e2e_nlg", "default",
        "refs/convert/parquet", renamed=(("mr", "meaning_representation"), ("ref", "target")),
    ),
    "wordnet-glosses": TextSet(("word",), (0, 0), "generation", "bleu", 0, "gloss", "wordnet"),
    "vader-tweets": _rated("tweets"),
    "vader-movies": _rated("movieReviewSnippets"),
    "vader-products": _rated("amazonReviewSnippets"),
    "vader-news": _rated("nytEditorialSnippets"),
}  # fmt: skip


def read_rows(name: str, split: str, source: str = "auto") -> Rows:
    """Rows of one split ("train" or "validation") of a task of SETS, in the order of the files.

    `source`: "local" (COMPRESSIBLE_DATA, the cache and manifest.toml's own sources), "hub", or "auto", which is
    local first. Raises DataError if they cannot be had, ValueError for an unknown name, split or
    source.
    """
    for kind, value, known in (("task", name, SETS), ("split", split, SPLITS), ("source", source, SOURCES)):
        if value not in known:
            raise ValueError(checks.unknown(kind, value, known))
    task = SETS[name]
    if not task.repository:
        if source == "hub":
            raise DataError(f"{name} is not on the hub: take source 'local' or 'auto'")
        return _read_glosses(split) if task.folder == "wordnet" else _read_rated(task.folder, split)
    if source == "hub":
        return _read_hub(task, split)
    try:
        return _read_local(task, split)
    except DataError as local:
        if source == "local":
            raise
        try:
            return _read_hub(task, split)
        except DataError as error:
            raise DataError(f"{error}\n{local}") from None


def data_digests(*names: str) -> dict[str, str]:
    """sha256 by "name/file" of all that tasks of SETS and models are read from, to give to a run as its data.

    A file of manifest.toml has its digest from there; those of other models and of the hub's data sets are read,
    fetched where they are not yet in the hub's cache. Raises DataError if they cannot be had.
    """
    found: dict[str, str] = {}
    for name in names:
        found |= _digests_of_task(SETS[name]) if name in SETS else hub.model_digests(name)
    return found


def _digests_of_task(task: TextSet) -> dict[str, str]:
    manifest = load_manifest()
    if not task.repository:
        files = FILES if task.folder == "wordnet" else [RATED]
        return {file: manifest[file].sha256 for file in files}
    found = {}
    for split in SPLITS:
        file, part = _local_file(task, split), _part(task, split)
        if file in manifest and (manifest[file].sources or find(file)):
            found[file] = manifest[file].sha256
        else:
            kept = hub.table_files(task.repository, task.config, part, task.revision)
            found |= {f"{task.repository}/{task.config}/{part}/{path.name}": sha256(path) for path in kept}
    return found


def _local_file(task: TextSet, split: str) -> str:
    return f"{task.folder}/{_part(task, split)}.csv.gz"


def _part(task: TextSet, split: str) -> str:
    return task.validation if split == "validation" else split


def _read_local(task: TextSet, split: str) -> Rows:
    file = _local_file(task, split)
    # Texts such as "NA" and "null" are texts.
    return _rows(pd.read_csv(fetch(file), keep_default_na=False, dtype=dict.fromkeys(task.texts, str)), task, file)


def _read_hub(task: TextSet, split: str) -> Rows:
    names = dict(task.renamed)
    columns = {name: names.get(name, name) for name in (*task.texts, task.label)}
    part = _part(task, split)
    frame = hub.read_table(task.repository, task.config, part, [*columns.values()], task.revision)
    expected = task.sizes[SPLITS.index(split)]
    if expected and len(frame) != expected:
        raise DataError(f"{task.repository} ({task.config}, {part}) has {len(frame)} rows, expected {expected}")
    frame = frame.set_axis([*columns], axis=1)
    return _rows(frame, task, f"hub:{task.repository}/{task.config}/{part}")


def _rows(frame: pd.DataFrame, task: TextSet, source: str) -> Rows:
    texts = list(zip(*(frame[name].tolist() for name in task.texts), strict=True))
    return Rows(texts, frame[task.label].tolist(), source)


def _read_glosses(split: str) -> Rows:
    texts, labels = glosses(split)
    return Rows([*texts], [*labels], f"wordnet, {split}")


def _read_rated(stem: str, split: str) -> Rows:
    """The seeded split of rated sentences: whole reviews and articles are held out, and no text is on both sides."""
    archive = fetch(RATED)
    groups, ratings, texts = _parse_rated(archive, stem)
    names, group = np.unique(groups, return_inverse=True)
    # The raw stream of a bit generator never changes; Generator.permutation may, between versions of numpy.
    order = np.argsort(np.random.PCG64(0).random_raw(len(names)), kind="stable")
    held = np.isin(group, order[: round(HELD_OUT * len(names))])
    seen = {text for text, out in zip(texts, held, strict=True) if out}
    keep = [bool(out) if split == "validation" else text not in seen for text, out in zip(texts, held, strict=True)]
    rows = [((text,), rating) for text, rating, kept in zip(texts, ratings, keep, strict=True) if kept]
    return Rows([row[0] for row in rows], [row[1] for row in rows], f"vader/{archive.name}#{stem}")


@functools.lru_cache(maxsize=4)
def _parse_rated(archive: Path, stem: str) -> tuple[list[str], list[float], list[str]]:
    """(review or article, mean rating from -4 to 4, text) of every line: id, rating, text, separated by tabs."""
    with tarfile.open(archive) as opened:
        member = opened.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
        assert member is not None  # it is a file
        content = member.read().decode("utf-8")
    lines = [line.split("\t", 2) for line in content.split("\r\n") if line]
    return (
        [identity.partition("_")[0] for identity, _, _ in lines],
        [float(rating) for _, rating, _ in lines],
        [text.strip() for _, _, text in lines],
    )
