"""Commands that show what is there and run no notebook: python -m compressible list | claims | index | site | data."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressible.companion import freshness, index, notebooks, publishing
from compressible.runtime import checks, paths


def add_list(commands: Any) -> None:
    """Add the one that lists the figures and their states to the subparsers of the command line."""
    listing = commands.add_parser("list", help="notebooks, presets, expected minutes, state of the figures")
    listing.add_argument("--check", action="store_true", help="hold each record against code, data, environment, "
                         "commit and files, and say what does not fit")  # fmt: skip
    listing.set_defaults(command=_list)


def add_pages(commands: Any) -> None:
    """Add those of what is made of records: the table of claims, a batch's page, the site."""
    _add_claims(commands.add_parser("claims", help="table of the papers' claims over all figures"))
    _add_index(commands.add_parser("index", help="page and last lines of a batch: what was built, where, what failed"))
    site = commands.add_parser("site", help="static, offline site of records, claims and notebooks; executes nothing")
    site.add_argument("--out", type=Path, metavar="FOLDER", help="where to build it (default: build/site)")
    site.set_defaults(command=_site)


def add_data(commands: Any) -> None:
    """Add the one that lists the data files."""
    commands.add_parser("data", help="data files: size, where they are, licence").set_defaults(command=_data)


def _add_claims(claims: argparse.ArgumentParser) -> None:
    claims.add_argument("--format", choices=("text", "markdown"), default="text")
    either = claims.add_mutually_exclusive_group()
    either.add_argument("--preset", help="only the records of this preset; 'own': of the preset that a claim names")
    either.add_argument("--write", action="store_true", help="write CLAIMS.md, GALLERY.md, the README's table and "
                        "what notebooks show of their records")  # fmt: skip
    either.add_argument("--since", metavar="COMMIT", help="verdicts that changed since then, as lines of CHANGELOG.md")
    claims.set_defaults(command=_claims)


def _add_index(page: argparse.ArgumentParser) -> None:
    page.add_argument("label", metavar="LABEL", help="folder below figures/, such as quick")
    page.add_argument("ids", nargs="*", metavar="ID", help="what the batch was to build (default: whatever is there)")
    page.add_argument("--since", type=float, default=0.0, metavar="SECONDS", help="Unix time at which the batch began")
    page.set_defaults(command=_index)


def _list(arguments: argparse.Namespace) -> int:
    if arguments.check:
        return publishing.check_records()
    rows = [("notebook", "preset", "minutes", "GPU", "state")]
    for id in notebooks.ids():
        for label, preset in notebooks.presets(id).items():
            gpu = "yes" if preset.gpu else "no"
            rows.append((id, label, f"{preset.minutes:g}", gpu, freshness.state(id, label)))
        rows += [(id, label, "-", "-", freshness.state(id, label)) for label in freshness.own_labels(id)]
    _print_table(rows)
    return 0


def _claims(arguments: argparse.Namespace) -> int:
    from compressible.companion import claims

    if arguments.preset is not None:
        claims.check_preset(arguments.preset)
    if arguments.since is not None:
        from compressible.companion.claims import changes

        print(changes.since(arguments.since), end="")
        return 0
    if arguments.write:
        for path in claims.write():
            print(f"written: {path.relative_to(paths.repository())}")
        return 0
    print(claims.table(format=arguments.format, preset=arguments.preset), end="")
    return 0


def _index(arguments: argparse.Namespace) -> int:
    root, label = paths.figures_dir(), notebooks.checked_label(arguments.label)
    if not (root / label).is_dir():
        raise notebooks.BatchError(f"no figures under the label {checks.shown(label)}: {root / label} is no folder")
    index.write_index(root, label, arguments.since)
    print(*index.summary(root, label, arguments.since, arguments.ids), sep="\n")
    return 0


def _site(arguments: argparse.Namespace) -> int:
    from compressible.companion import site

    started = time.perf_counter()
    front = site.build(arguments.out and arguments.out.absolute())
    print(f"site: {front}, built in {time.perf_counter() - started:.0f} s")
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from compressible.data import manifest

    rows = [("file", "MB", "where", "licence")]
    for name, entry in manifest.load_manifest().items():
        rows.append((name, f"{entry.size / 1e6:.2f}", _whereabouts(name), entry.licence))
    _print_table(rows)
    return 0


def _whereabouts(name: str) -> str:
    local = os.environ.get("COMPRESSIBLE_DATA")
    if local and (Path(local).expanduser() / name).is_file():
        return "local"
    return "cached" if (paths.cache_dir() / "data" / name).is_file() else "-"


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
