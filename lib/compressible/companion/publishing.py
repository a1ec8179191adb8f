"""The commands of a release: python -m compressible environment | times | release, and list --check."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from compressible.companion import notebooks, pins, provenance
from compressible.runtime import paths


def add(commands: Any) -> None:
    """Add these commands to the subparsers of the command line."""
    commands.add_parser("times", help="how long each committed figure took, as a table").set_defaults(command=_times)
    release = commands.add_parser("release", help="source archive, wheel, site and records with checksums, of HEAD")
    release.add_argument("--draft", action="store_true", help="also where records are not of the code that is here")
    release.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder (default: dist/<version>)")
    release.set_defaults(command=_release)
    pinned = commands.add_parser("environment", help="whether what is installed is a pinned environment")
    pinned.add_argument("--freeze", action="store_true", help="print what is installed, as a file of pins")
    pinned.set_defaults(command=_environment)


def check_records() -> int:
    """Print why records cannot be trusted as ones of this checkout; 0 where all can, else 1, as where there is none."""
    from compressible.companion import verification

    found = {
        (id, label): verification.reasons(id, label) for id in notebooks.ids() for label in verification.labels(id)
    }
    for (id, label), reasons in found.items():
        print("".join(f"{id}, {label}: {reason}\n" for reason in reasons), end="")
    good = sum(not reasons for reasons in found.values())
    print(f"{good} of {len(found)} records are of this code, data and environment, whole, and of a commit behind HEAD")
    if not found:  # which all of none would pass
        print(f"there is no record under {paths.figures_dir()}; COMPRESSIBLE_FIGURES names another place")
    return 0 if found and good == len(found) else 1


def _times(arguments: argparse.Namespace) -> int:
    from compressible.companion import timings

    print(timings.table(), end="")
    return 0


def _release(arguments: argparse.Namespace) -> int:
    from compressible.companion import release

    began = time.perf_counter()
    with paths.variables_set(COMPRESSIBLE_FIGURES=str(paths.repository() / "figures")):  # those that it is made of
        fits = check_records() == 0
    if not fits and not arguments.draft:
        raise release.ReleaseError(
            "records do not fit this checkout, expected that all do; --draft makes one all the same"
        )
    folder = release.build(arguments.out and arguments.out.absolute())
    print(release.report(folder, began))
    return 0


def _environment(arguments: argparse.Namespace) -> int:
    found, python = pins.installed(), sys.version.split()[0]
    if arguments.freeze:
        print(f"# Python {python}, {sys.platform}\n{pins.written(found)}", end="")
        return 0
    state = pins.state(provenance.PACKAGES)
    told = f"{len(found)} packages of Python {python} are those of {state['pinned']}"
    differs = state["differs"] or ["there is no file of pins here, constraints*.txt of a checkout"]
    print(told if state["pinned"] else "\n".join(["installed is no pinned environment:", *differs]))
    return 0 if state["pinned"] else 1
