"""A queue of commands for the GPUs and cores of one host, which goes on between short calls of it.

    python profiles/offline/lanes.py start --gpus 4 --each 2 --cores 8     # lanes, each with one command at a time
    python profiles/offline/lanes.py push mpnet-08 -- python -m compressible run yaras2024/08_few_shot --preset mpnet
    python profiles/offline/lanes.py push --on core paper-05 -- python -m compressible run kwon2024/05_completion
    python profiles/offline/lanes.py wait 540      # says what ends; status 75: something is left, 1: something failed
    python profiles/offline/lanes.py collect OUT figures/paper figures/mpnet       # archives of what is there by now
    python profiles/offline/lanes.py stop

Some hosts run a command for minutes and then end what it started; a lane is a session of its own and goes on. A lane
shows its commands one GPU, or none. Where a host died, or a lane was killed, `start` puts what it ran back at the head
of the queue, which lies in $COMPRESSIBLE_LANES; job_queue.py tells how. Only Python itself is needed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from archives import collect
from job_queue import folder_of, jobs_in, log_of, place_in_queue, push, root, wait, write

KINDS = ("gpu", "core")


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
        with log_of(f"lane-{name}").open("ab") as log:
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _requeue_lost() -> None:
    """Put back what lanes ran that were killed, or died with their host, also where they are not started again."""
    for name in {file.stem.rpartition(".")[2] for file in folder_of("running").glob("*.json")}:
        with (folder_of("lanes") / name).open("w") as lock:
            if _held(lock, 0):
                _requeue(name)


def _requeue(name: str) -> None:
    """Put back what runs under the name of a lane whose lock is ours: nobody else would ever end it."""
    for file in folder_of("running").glob(f"*.{name}.json"):
        print(f"{json.loads(file.read_text())['name']}: waits once more, as its lane {name} was killed", flush=True)
        file.rename(place_in_queue(file))


def lane(name: str, shown: str) -> None:
    """Run jobs one after another until `stop`; a lane of this name that is there already is enough.

    What it runs holds its lock as well: while a command goes on whose lane was killed, there is no other lane of the
    name, and the command does not run twice.
    """
    with (folder_of("lanes") / name).open("w") as lock:
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
    done = {job["name"] for job in jobs_in("ended") if job["status"] == 0}
    for file in sorted(folder_of("queue").glob(f"*.{kind}.json")):
        try:
            if not done.issuperset(json.loads(file.read_text())["after"]):
                continue
            return file.rename(folder_of("running") / f"{file.stem}.{name}.json")  # whose it is, also after a kill
        except FileNotFoundError:
            continue
    return None


def _run(file: Path, name: str, shown: str, lock: int) -> None:
    """Run a job once its GPU is free for it: whoever wants one alone keeps the others' next commands at the door."""
    job = json.loads(file.read_text())
    with _place(shown or name, "door") as door, _place(shown or name, "room") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if job["alone"] else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        if _stopped():  # meanwhile
            file.rename(place_in_queue(file))
        else:
            _run_here(file, job, name, shown, lock)


def _place(shown: str, name: str) -> IO[str]:
    return (folder_of("gpus") / f"{shown}.{name}").open("w")


def _run_here(file: Path, job: dict[str, Any], name: str, shown: str, lock: int) -> None:
    began = time.time()
    job |= {"lane": name, "began": began}
    told = os.environ | job["environment"] | {"CUDA_VISIBLE_DEVICES": shown, "OMP_NUM_THREADS": "1"}
    with log_of(job["name"]).open("ab") as log:
        write(file, job)
        try:
            # A session of its own, so that `stop` ends a command with all that it started.
            process = subprocess.Popen(job["command"], cwd=job["folder"], env=told, stdin=subprocess.DEVNULL,
                                       stdout=log, stderr=log, start_new_session=True, pass_fds=[lock])  # fmt: skip
            status = _ended(process)
        except OSError as error:
            log.write(f"{error}\n".encode())
            status = 127
    if status and job["again"] and not job["alone"] and not _stopped():
        write(place_in_queue(file), job | {"alone": True})
        file.unlink()
        return
    kept = {key: value for key, value in job.items() if key != "environment"}  # which archives would carry along
    kept |= {"status": status, "seconds": round(time.time() - began, 1)}
    write(folder_of("ended") / place_in_queue(file).name, kept)
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


def stop() -> None:
    """End all lanes and what they run, and wait until they have; what waits is left in the queue."""
    (folder_of("lanes").parent / "stopped").touch()
    for file in folder_of("lanes").iterdir():
        with file.open("w") as lock:
            _held(lock, 30)


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
