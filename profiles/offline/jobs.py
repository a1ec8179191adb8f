"""Prints the calls of lanes.py for all records of some presets that the code here did not make, the longest first.

    python profiles/offline/jobs.py --presets paper mpnet --split yaras2024/table1_glue tasks step_counts > .gpu/jobs.sh

Made where the records are; they need not travel. A notebook that is split gets a job for each value of a list, with the
values of other lists at the same place, under a label of its own, and one that runs it whole afterwards and finds the
parts in the cache.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch

from compressible.companion import freshness, notebooks


def wanted(presets: Sequence[str], leave: Sequence[str]) -> list[tuple[float, str, str, str]]:
    """Minutes, kind of lane, id and preset of what is not done, the longest first."""
    found = []
    for id in notebooks.ids():
        for label, preset in notebooks.presets(id).items():
            left = any(fnmatch(_name(id, label), each) for each in leave)
            if label in presets and not left and freshness.state(id, label) != "done":
                found.append((preset.minutes, "gpu" if preset.gpu else "core", id, label))
    return sorted(found, reverse=True)


def calls(
    id: str, preset: str, kind: str, split: Mapping[str, Sequence[str]], alone: Sequence[str] = ()
) -> Iterator[list[str]]:
    """The arguments of lanes.py for a record, after its parts; alone: patterns of names of what measures time."""
    run, name, after = ["python3", "-m", "compressible", "run", id, "--preset", preset], _name(id, preset), list[str]()
    again = ["--again"] if kind == "gpu" else []  # two passes may not fit one GPU
    values = notebooks.defaults(notebooks.notebook_path(id)) | notebooks.plan(id, preset)
    names = split.get(id, ())
    if other := [name for name in names if not isinstance(values.get(name), list)]:
        raise SystemExit(f"--split {id} {' '.join(other)}: expected names of lists among its parameters")
    for place in zip(*(values[each] for each in names), strict=True):
        given = ["--label", f"part-{preset.replace('_', '-')}-{place[0]}"]
        given += [word for each, value in zip(names, place, strict=True) for word in ("-p", each, json.dumps([value]))]
        yield ["push", "--on", kind, *again, f"{name}.{place[0]}", "--", *run, *given]
        after += ["--after", f"{name}.{place[0]}"]
    again = ["--alone"] if any(fnmatch(name, each) for each in alone) else again
    yield ["push", "--on", kind, *again, *after, name, "--", *run]


def _name(id: str, preset: str) -> str:
    return f"{preset}.{id.replace('/', '.')}"


def main() -> None:
    """Print the calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", required=True)
    parser.add_argument("--leave", nargs="*", default=[], metavar="NAME", help="such as 'paper.yaras2024.*'")
    parser.add_argument(
        "--alone", nargs="*", default=[], metavar="NAME", help="what has a GPU to itself, as it measures time"
    )
    parser.add_argument("--split", nargs="+", action="append", default=[], metavar=("ID", "NAME"), help="lists; the "
                        "first names the parts")  # fmt: skip
    asked = parser.parse_args()
    known = {label for id in notebooks.ids() for label in notebooks.presets(id)}
    if unknown := [each for each in asked.presets if each not in known]:
        raise SystemExit(f"--presets is {' '.join(unknown)}, expected of {', '.join(sorted(known))}")
    for id in (id for id, *_ in asked.split if id not in notebooks.ids()):
        raise SystemExit(f"--split {id}: expected the id of a notebook")
    for minutes, kind, id, preset in wanted(asked.presets, asked.leave):
        print(f"{id} {preset}: {minutes:g} min, {kind}", file=sys.stderr)
        split = {each: names for each, *names in asked.split}
        for call in calls(id, preset, kind, split, asked.alone):
            print(shlex.join(["python3", "profiles/offline/lanes.py", *call]))


if __name__ == "__main__":
    main()
