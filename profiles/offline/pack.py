"""Packs, where there is a network, what an offline host lacks: wheels for its Python, models and data, in small parts.

    python profiles/offline/pack.py .gpu --wheels 3.12 --have installed.txt        # installed.txt: `pip freeze` there
    python profiles/offline/pack.py .gpu --files mpnet minilm glue-stsb wordnet

Wheels are those of constraints-gpu.txt that the host does not have, in .gpu/wheels. Files of the manifest whose name
begins so are cut into .gpu/part00, part01, ... of --mb megabytes each, in the order in which they are named, so that
they fit where a call may carry little. On the host `. profiles/offline/host.sh` installs the wheels, and `unpack.py`
joins the parts that have come.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

from compressible.data import manifest
from compressible.runtime.paths import repository

PLATFORMS = [*(f"manylinux_2_{minor}" for minor in range(39, 16, -1)), "manylinux2014", "manylinux2010", "manylinux1"]
LOCAL = re.compile(r"[-_.]+")


def wheels(folder: Path, version: str, have: Path | None) -> None:
    """Download the pinned wheels that the host lacks, for its Python, without what they need beside."""
    pins = (repository() / "constraints-gpu.txt").read_text().splitlines()
    pinned = {_plain(line.partition("==")[0]): line for line in pins if "==" in line and not line.startswith("#")}
    there = re.split(r"[\s,]+", have.read_text()) if have else []
    lacking = [line for name, line in pinned.items() if name not in {_plain(each.partition("==")[0]) for each in there}]
    where = [word for platform in PLATFORMS for word in ("--platform", f"{platform}_x86_64")]
    python = ["--python-version", version, "--implementation", "cp", "--only-binary=:all:"]
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *python, *where, "-d", str(folder)]
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
    for line in lacking:  # one by one: a package without a wheel stops no other
        if not subprocess.run([*download, line], check=False).returncode:
            continue
        before = set(folder.glob("*.whl"))
        subprocess.run([*build, line], check=False)  # of the sources, which serves where these are Python's alone
        made = set(folder.glob("*-none-any.whl")) - before
        print(f"{'built' if made else 'no wheel'}: {line}", file=sys.stderr)


def parts(folder: Path, wanted: Sequence[str], size: int) -> list[Path]:
    """Cut files of the manifest, in the order in which they are wanted, into part folders of `size` bytes.

    Chunks say which of how many they are.
    """
    made, room = list[Path](), 0
    known = manifest.load_manifest()
    if unknown := [begin for begin in wanted if not any(name.startswith(begin) for name in known)]:
        raise SystemExit(f"--files is {' '.join(unknown)}, expected how names in the manifest begin: none begins so")
    for old in folder.glob("part[0-9][0-9]"):
        shutil.rmtree(old)
    for name in dict.fromkeys(name for begin in wanted for name in known if name.startswith(begin)):
        try:
            content = manifest.fetch(name).read_bytes()
        except manifest.DataError as error:
            print(f"left out: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            continue
        cuts = _cuts(len(content), room, size)
        for number, (begin, end) in enumerate(cuts):
            if not room:
                made.append(folder / f"part{len(made):02}")
                made[-1].mkdir(parents=True)
                room = size
            (made[-1] / f"{quote(name, safe='')}.{number}.{len(cuts)}").write_bytes(content[begin:end])
            room -= end - begin
    return made


def _cuts(total: int, room: int, size: int) -> list[tuple[int, int]]:
    """Where a file of `total` bytes is cut: into what there is room for, and then into pieces of `size`."""
    return list(pairwise([0, *range(room or size, total, size), total]))


def _plain(name: str) -> str:
    return LOCAL.sub("-", name.strip()).lower()


def main() -> None:
    """Pack what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheels", metavar="PYTHON", help="the host's Python, such as 3.12")
    parser.add_argument("--have", type=Path, help="file of packages that are there, by name or name==version")
    parser.add_argument("--files", nargs="*", default=[], help="how names in the manifest begin")
    parser.add_argument("--mb", type=float, default=50, help="of a part")
    asked = parser.parse_args()
    if not asked.mb * 2**20 >= 1:
        raise SystemExit(f"--mb is {asked.mb:g}, expected a size of at least a byte")
    if asked.wheels:
        wheels(asked.folder / "wheels", asked.wheels, asked.have)
    if asked.files:
        for part in parts(asked.folder, asked.files, int(asked.mb * 2**20)):
            print(part, sum(file.stat().st_size for file in part.iterdir()) >> 20, "MB")


if __name__ == "__main__":
    main()
