"""Cells of beyond/07_method_or_tuning without its notebook: computes what is missing, merges folders, lists what lacks.

    python benchmarks/tuning_cells.py --preset mpnet --seconds 540 --cells CELLS      # goes on where CELLS is
    python benchmarks/tuning_cells.py --preset mpnet --cells CELLS --merge FROM       # from another machine
    python benchmarks/tuning_cells.py --preset mpnet --cells CELLS --seconds 0 --pack FILE    # as one file, for --merge
    python benchmarks/tuning_cells.py --preset mpnet --cells CELLS --seconds 0 --set methods '["standard", "thin"]'

A call ends after about so many seconds, with whole cells in the folder; the notebook reads those in
$COMPRESSIBLE_CACHE/cells. The first call of a part takes the data and the model, then 40 runs a device at a time. Calls
with --beside-others share the work, each with a GPU of its own, say.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressible.companion import notebooks
from compressible.companion.library import REACHED
from compressible.companion.reached import reached_digest
from compressible.experiments.tuning_cells import Cells, merge, pack
from compressible.experiments.tuning_outcome import label, outcome
from compressible.experiments.tuning_sweep import planned, sweep_of
from compressible.experiments.tuning_worker import Worker
from compressible.runtime.paths import cache_dir

ID = "beyond/07_method_or_tuning"


def main() -> None:
    """Merge, compute, and say what is missing."""
    asked = _asked()
    values = values_of(asked.preset, dict(asked.set))
    root = asked.cells or cache_dir() / "cells"
    for folder in asked.merge:
        print(f"{merge(folder, root)} cells from {folder}")
    sweep = sweep_of(values)
    cells = Cells(sweep.setting(), root)
    if asked.seconds > 0:
        devices = None if values["devices"] == "one" else values["devices"]
        Worker(sweep, cells, values["device"], devices, asked.seconds, values["max_stack"], asked.beside_others).work()
    if asked.pack:
        cells.folder.mkdir(parents=True, exist_ok=True)
        print(f"{pack(cells.folder.parent, asked.pack)} cells in {asked.pack}")
    found = outcome(sweep, cells)
    print(f"{found['cells']} cells of finished parts, {found['cell seconds']:.0f} device seconds, in {cells.folder}")
    missing = set(found["missing"])
    for place, name in planned(sweep):
        told = f"{name} on {label(sweep, place)}"
        print(f"  {'missing' if told in missing else 'done   '} {told}")


def values_of(preset: str, given: Mapping[str, str]) -> dict[str, Any]:
    """The notebook's parameters under a preset, but those `given`; cells from now on tell what of lib it reaches."""
    notebook = notebooks.notebook_path(ID)
    os.environ[REACHED] = reached_digest(notebook) or ""
    own = "cells" if given else None  # no figure is drawn here, so that none is replaced under the preset's name
    return notebooks.defaults(notebook) | notebooks.plan(ID, preset, overrides=dict(given), label=own)


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no further call after so long; 0: none")
    parser.add_argument("--cells", type=Path, help="folder of the cells, by default in the cache")
    parser.add_argument("--merge", type=Path, action="append", default=[], help="folder, or file of --pack, to take "
                        "further cells from")  # fmt: skip
    parser.add_argument("--beside-others", action="store_true", help="leave what another process computes now: any "
                        "number of such calls share a folder")  # fmt: skip
    parser.add_argument("--pack", type=Path, help="file to write all cells of the folder to")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
