"""The queue that lanes.py works off: jobs as files, which one pushes and waits for. Only Python itself is needed.

Whatever is there lies in $COMPRESSIBLE_LANES (by default a folder of /tmp): jobs move from `queue` to `running` to
`ended`, each a small JSON file, with its output in `logs`.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = re.compile(r"[\w.-]+")
LEFT, FAILED = 75, 1  # exit statuses of `wait`: call again; something failed


def root() -> Path:
    """The folder of the queue."""
    named = os.environ.get("COMPRESSIBLE_LANES")
    return Path(named) if named else Path(tempfile.gettempdir()) / f"compressible-lanes-{os.getuid()}"


def folder_of(name: str) -> Path:
    """A folder of the queue's, which is made where it is not there."""
    folder = root() / name
    root().mkdir(mode=0o700, parents=True, exist_ok=True)  # jobs hold their environment
    folder.mkdir(exist_ok=True)
    return folder


def log_of(name: str) -> Path:
    """The file of what a job, or a lane, has said."""
    return folder_of("logs") / f"{name}.log"


def jobs_in(folder: str) -> list[dict[str, Any]]:
    """The jobs of a folder, in their order; one that moves on meanwhile is left out."""
    found = []
    for file in sorted(folder_of(folder).glob("*.json")):
        try:
            found.append(json.loads(file.read_text()))
        except FileNotFoundError:
            continue
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a job whole or not at all: others look meanwhile."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.rename(path)


def place_in_queue(file: Path) -> Path:
    """The place in the queue of a job that runs."""
    return folder_of("queue") / f"{file.stem.rpartition('.')[0]}.json"


def push(
    name: str, kind: str, command: Sequence[str], after: Sequence[str] = (), alone: bool = False, again: bool = False
) -> None:
    """Queue a command, which runs where this call runs and with its environment, once the jobs `after` are done.

    alone: no other command has its GPU meanwhile, as one wants that measures time. again: if it fails beside others,
    whose memory it may have lacked, it runs once more alone.
    """
    if not NAME.fullmatch(name) or not command:
        told = f"name is {name!r} and command {list(command)}"
        raise SystemExit(f"{told}, expected a name of letters, digits, '.', '_' and '-', and a command")
    if any(known["name"] == name for folder in ("queue", "running", "ended") for known in jobs_in(folder)):
        raise SystemExit(f"name is {name!r}, expected one that no job has had")
    job = {"name": name, "command": list(command), "folder": os.getcwd(), "environment": dict(os.environ)}
    job |= {"after": list(after), "alone": alone, "again": again}
    write(folder_of("queue") / f"{time.time_ns()}.{name}.{kind}.json", job)


def wait(seconds: float, lines: int = 1) -> int:
    """Say what ends, until all has or the time is over, then what is under way; the exit status.

    The queue is looked at twice, since a job that runs once more goes back there from what runs. What waits for a job
    that failed is not waited for.
    """
    if math.isnan(seconds):
        raise SystemExit("seconds is nan, expected a number")
    until, told = time.monotonic() + seconds, set[str]()
    while True:
        lost = _lost()
        left = any(job["name"] not in lost for folder in ("queue", "running", "queue") for job in jobs_in(folder))
        for job in jobs_in("ended"):
            if job["name"] not in told:
                told.add(job["name"])
                how = "done" if job["status"] == 0 else f"FAILED with status {job['status']}"
                print(f"{job['name']}: {how} after {job['seconds']:.0f} s on {job['lane']}", flush=True)
        if not left or time.monotonic() > until:
            break
        time.sleep(0.2)
    for job in jobs_in("running"):
        if "lane" not in job:
            print(f"{job['name']}: waits until its GPU is free", flush=True)
            continue
        last = log_of(job["name"]).read_text(errors="replace").splitlines()[-lines:] if lines else []
        print(f"{job['name']}: under way on {job['lane']}", *last, sep="\n    ", flush=True)
    for name, reason in lost.items():
        print(f"{name}: cannot begin, {reason}", flush=True)
    for name, others in _unknown().items():
        print(f"{name}: waits for {others}, which nobody has pushed", flush=True)
    print(f"{len(jobs_in('queue'))} wait, {len(jobs_in('running'))} under way, {len(told)} ended", flush=True)
    return LEFT if left else FAILED if lost or any(job["status"] for job in jobs_in("ended")) else 0


def _lost() -> dict[str, str]:
    """Jobs that never begin, by name, and why: what they come after has failed, or never begins either."""
    bad = {job["name"] for job in jobs_in("ended") if job["status"]}
    lost = dict[str, str]()
    for job in jobs_in("queue") * 2:  # twice, as one may have been pushed before what it comes after
        if stopped := bad.intersection(job["after"]):
            lost[job["name"]] = f"since {', '.join(sorted(stopped))} failed or cannot"
            bad.add(job["name"])
    return lost


def _unknown() -> dict[str, str]:
    """What waiting jobs come after and nobody has pushed, by the name of the job."""
    known = {job["name"] for folder in ("queue", "running", "ended") for job in jobs_in(folder)}
    lacking = {job["name"]: [name for name in job["after"] if name not in known] for job in jobs_in("queue")}
    return {name: ", ".join(names) for name, names in lacking.items() if names}
