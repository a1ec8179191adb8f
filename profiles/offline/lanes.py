"""A queue of commands for the GPUs and cores of one host, which goes on between short calls of it.

    python profiles/offline/lanes.py start --gpus 4 --each 2 --cores 8     # lanes, each with one command at a time
    python profiles/offline/lanes.py push mpnet-08 -- python -m compressible run yaras2024/08_few_shot --preset mpnet
    python profiles/offline/lanes.py push --on core paper-05 -- python -m compressible run kwon2024/05_completion
    python profiles/offline/lanes.py wait 540      # says what ends; status 75: something is left, 1: something failed
    python profiles/offline/lanes.py collect OUT figures/paper figures/mpnet       # archives of what is there by now
    python profiles/offline/lanes.py stop

Some hosts run a command for minutes and then end what it started; a lane is a session of its own and goes on. Whatever
is there lies in $COMPRESSIBLE_LANES (by default a folder of /tmp): jobs move from `queue` to `running` to `ended`, each
a small JSON file, with its output in `logs`. A lane shows its commands one GPU, or none. Where a host died, or a
lane was killed, `start` puts what it ran back at the head of the queue. Only Python itself is needed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from archives import collect

KINDS = ("gpu", "core")
NAME = re.compile(r"[\w.-]+")
LEFT, FAILED = 75, 1  # exit statuses of `wait`: call again; something failed


def root() -> Path:
    """The folder of the queue."""
    named = os.environ.get("COMPRESSIBLE_LANES")
    return Path(named) if named else Path(tempfile.gettempdir()) / f"compressible-lanes-{os.getuid()}"


def start(gpus: int, each: int, cores: int) -> None:
    """Start the lanes that are not there, after what lanes that are no more have left is in the queue again."""
    if min(gpus, cores) < 0 or not 1 <= each <= 26 or not gpus + cores:
        told = f"--gpus is {gpus}, --each {each} and --cores {cores}"
        raise SystemExit(f"{told}, expected a GPU or a core at least, and from 1 to 26 lanes a GPU")
    (root() / "stopped").unlink(missing_ok=True)
    _requeue_lost()
    lanes = [(f"gpu{gpu}{chr(97 + turn)}", str(gpu)) for turn in range(each) for gpu in range(gpus)]
    lanes += [(f"core{core}", "") for core in range(cores)]
    for name, shown in lanes:
        command = [sys.executable, __file__, "lane", name, "--shown", shown]
        with _log(f"lane-{name}").open("ab") as log:
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _requeue_lost() -> None:
    """Put back what lanes ran that were killed, or died with their host, also where they are not started again."""
    for name in {file.stem.rpartition(".")[2] for file in _folder("running").glob("*.json")}:
        with (_folder("lanes") / name).open("w") as lock:
            if _held(lock, 0):
                _requeue(name)


def _requeue(name: str) -> None:
    """Put back what runs under the name of a lane whose lock is ours: nobody else would ever end it."""
    for file in _folder("running").glob(f"*.{name}.json"):
        print(f"{json.loads(file.read_text())['name']}: waits once more, as its lane {name} was killed", flush=True)
        file.rename(_waiting(file))


def lane(name: str, shown: str) -> None:
    """Run jobs one after another until `stop`; a lane of this name that is there already is enough.

    What it runs holds its lock as well: while a command goes on whose lane was killed, there is no other lane of the
    name, and the command does not run twice.
    """
    with (_folder("lanes") / name).open("w") as lock:
        if not _held(lock):
            return
        _requeue(name)
        while not _stopped():
            job = _taken(name, "gpu" if shown else "core")
            if job is None:
                time.sleep(0.2)
            else:
                _run(job, name, shown, lock.fileno())


def _held(lock: IO[str], seconds: float = 5) -> bool:
    """Whether the lock is ours within some seconds, in which a lane that was stopped has ended."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.2)


def _stopped() -> bool:
    return (root() / "stopped").exists()


def _taken(name: str, kind: str) -> Path | None:
    """The next job whose forerunners are done, moved to what runs: only one lane can move it."""
    done = {job["name"] for job in _jobs("ended") if job["status"] == 0}
    for file in sorted(_folder("queue").glob(f"*.{kind}.json")):
        try:
            if not done.issuperset(json.loads(file.read_text())["after"]):
                continue
            return file.rename(_folder("running") / f"{file.stem}.{name}.json")  # whose it is, also after a kill
        except FileNotFoundError:
            continue
    return None


def _waiting(file: Path) -> Path:
    """The place in the queue of a job that runs."""
    return _folder("queue") / f"{file.stem.rpartition('.')[0]}.json"


def _run(file: Path, name: str, shown: str, lock: int) -> None:
    """Run a job once its GPU is free for it: whoever wants one alone keeps the others' next commands at the door."""
    job = json.loads(file.read_text())
    with _place(shown or name, "door") as door, _place(shown or name, "room") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if job["alone"] else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        if _stopped():  # meanwhile
            file.rename(_waiting(file))
        else:
            _run_here(file, job, name, shown, lock)


def _place(shown: str, name: str) -> IO[str]:
    return (_folder("gpus") / f"{shown}.{name}").open("w")


def _run_here(file: Path, job: dict[str, Any], name: str, shown: str, lock: int) -> None:
    began = time.time()
    job |= {"lane": name, "began": began}
    told = os.environ | job["environment"] | {"CUDA_VISIBLE_DEVICES": shown, "OMP_NUM_THREADS": "1"}
    with _log(job["name"]).open("ab") as log:
        _write(file, job)
        try:
            # A session of its own, so that `stop` ends a command with all that it started.
            process = subprocess.Popen(job["command"], cwd=job["folder"], env=told, stdin=subprocess.DEVNULL,
                                       stdout=log, stderr=log, start_new_session=True, pass_fds=[lock])  # fmt: skip
            status = _ended(process)
        except OSError as error:
            log.write(f"{error}\n".encode())
            status = 127
    if status and job["again"] and not job["alone"] and not _stopped():
        _write(_waiting(file), job | {"alone": True})
        file.unlink()
        return
    kept = {key: value for key, value in job.items() if key != "environment"}  # which archives would carry along
    _write(_folder("ended") / _waiting(file).name, kept | {"status": status, "seconds": round(time.time() - began, 1)})
    file.unlink()


def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a process, which is ended with all of its session once the lanes are stopped."""
    told = False
    while (status := process.poll()) is None:
        if _stopped() and not told:
            told = True
            os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.1)
    return status


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
    if any(known["name"] == name for folder in ("queue", "running", "ended") for known in _jobs(folder)):
        raise SystemExit(f"name is {name!r}, expected one that no job has had")
    job = {"name": name, "command": list(command), "folder": os.getcwd(), "environment": dict(os.environ)}
    job |= {"after": list(after), "alone": alone, "again": again}
    _write(_folder("queue") / f"{time.time_ns()}.{name}.{kind}.json", job)


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
        left = any(job["name"] not in lost for folder in ("queue", "running", "queue") for job in _jobs(folder))
        for job in _jobs("ended"):
            if job["name"] not in told:
                told.add(job["name"])
                how = "done" if job["status"] == 0 else f"FAILED with status {job['status']}"
                print(f"{job['name']}: {how} after {job['seconds']:.0f} s on {job['lane']}", flush=True)
        if not left or time.monotonic() > until:
            break
        time.sleep(0.2)
    for job in _jobs("running"):
        if "lane" not in job:
            print(f"{job['name']}: waits until its GPU is free", flush=True)
            continue
        last = _log(job["name"]).read_text(errors="replace").splitlines()[-lines:] if lines else []
        print(f"{job['name']}: under way on {job['lane']}", *last, sep="\n    ", flush=True)
    for name, reason in lost.items():
        print(f"{name}: cannot begin, {reason}", flush=True)
    for name, others in _unknown().items():
        print(f"{name}: waits for {others}, which nobody has pushed", flush=True)
    print(f"{len(_jobs('queue'))} wait, {len(_jobs('running'))} under way, {len(told)} ended", flush=True)
    return LEFT if left else FAILED if lost or any(job["status"] for job in _jobs("ended")) else 0


def _lost() -> dict[str, str]:
    """Jobs that never begin, by name, and why: what they come after has failed, or never begins either."""
    bad = {job["name"] for job in _jobs("ended") if job["status"]}
    lost = dict[str, str]()
    for job in _jobs("queue") * 2:  # twice, as one may have been pushed before what it comes after
        if stopped := bad.intersection(job["after"]):
            lost[job["name"]] = f"since {', '.join(sorted(stopped))} failed or cannot"
            bad.add(job["name"])
    return lost


def _unknown() -> dict[str, str]:
    """What waiting jobs come after and nobody has pushed, by the name of the job."""
    known = {job["name"] for folder in ("queue", "running", "ended") for job in _jobs(folder)}
    lacking = {job["name"]: [name for name in job["after"] if name not in known] for job in _jobs("queue")}
    return {name: ", ".join(names) for name, names in lacking.items() if names}


def stop() -> None:
    """End all lanes and what they run, and wait until they have; what waits is left in the queue."""
    (_folder("lanes").parent / "stopped").touch()
    for file in _folder("lanes").iterdir():
        with file.open("w") as lock:
            _held(lock, 30)


def _folder(name: str) -> Path:
    folder = root() / name
    root().mkdir(mode=0o700, parents=True, exist_ok=True)  # jobs hold their environment
    folder.mkdir(exist_ok=True)
    return folder


def _log(name: str) -> Path:
    return _folder("logs") / f"{name}.log"


def _jobs(folder: str) -> list[dict[str, Any]]:
    """The jobs of a folder, in their order; one that moves on meanwhile is left out."""
    found = []
    for file in sorted(_folder(folder).glob("*.json")):
        try:
            found.append(json.loads(file.read_text()))
        except FileNotFoundError:
            continue
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.rename(path)


def main() -> int:
    """Run one subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="verb", required=True)
    begin = commands.add_parser("start")
    for name in ("--gpus", "--each", "--cores"):
        begin.add_argument(name, type=int, default=int(name == "--each"))
    one = commands.add_parser("lane")
    one.add_argument("name")
    one.add_argument("--shown", default="")
    queued = commands.add_parser("push")
    queued.add_argument("--on", choices=KINDS, default="gpu")
    queued.add_argument("--after", action="append", default=[], metavar="NAME", help="wait until that one is done")
    queued.add_argument("--alone", action="store_true", help="with no other command on its GPU")
    queued.add_argument("--again", action="store_true", help="once more and alone, if it fails beside others")
    queued.add_argument("name")
    queued.add_argument("command", nargs="+")
    waiting = commands.add_parser("wait")
    waiting.add_argument("seconds", type=float)
    waiting.add_argument("--lines", type=int, default=1, help="of the output of what is under way")
    commands.add_parser("stop")
    packed = commands.add_parser("collect")
    packed.add_argument("out", type=Path)
    packed.add_argument("folders", type=Path, nargs="*")
    packed.add_argument("--mb", type=float, default=15, help="about how large an archive may be")
    asked = parser.parse_args()
    if asked.verb == "wait":
        return wait(asked.seconds, asked.lines)
    if asked.verb == "collect":
        print(*collect(asked.out, asked.folders, root(), asked.mb), sep="\n")
    elif asked.verb == "start":
        start(asked.gpus, asked.each, asked.cores)
    elif asked.verb == "push":
        push(asked.name, asked.on, asked.command, asked.after, asked.alone, asked.again)
    elif asked.verb == "lane":
        lane(asked.name, asked.shown)
    else:
        stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
