"""Many figures by one call: snakemake runs them, one line says how far it is, and the last lines what came of it."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from compressible.companion import batch, freshness, guard, index, notebooks
from compressible.runtime import checks, paths

# What `python -m compressible run` says at its end, snakemake at a job's start, and its table of the jobs to come.
ENDED = re.compile(r"(?P<id>[\w.-]+/[\w.-]+): (?P<how>done|FAILED) after (?P<seconds>\d+) s")
STARTED = re.compile(r"Job \d+: (?P<id>[\w.-]+/[\w.-]+), preset ")
COUNTED = re.compile(r"(?P<rule>figure|figure_on_gpu)\s+(?P<count>\d+)")
STOPPED = 130  # exit status after Ctrl-C, as a shell has it
TIME_IS_UP = 75  # EX_TEMPFAIL: call again
PATIENCE = 5  # seconds after Ctrl-C in which a batch ends by itself, before it is ended


@dataclass
class Progress:
    """How far a batch is, and how long it may still take."""

    minutes: Mapping[str, float]
    jobs: int
    total: int
    began: float = field(default_factory=time.monotonic)
    ended: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    started: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def note(self, line: str) -> bool:
        """Whether a line of the batch tells something new of it, which is kept."""
        if counted := COUNTED.fullmatch(line.strip()):
            self.counts[counted["rule"]] = int(counted["count"])
            self.total = sum(self.counts.values())
        if begun := STARTED.match(line):
            self.started[begun["id"]] = "under way"
        found = ENDED.match(line)
        if found and found["id"] in self.minutes:
            self.ended[found["id"]] = int(found["seconds"])
            self.started[found["id"]] = found["how"]
            self.failed += found["how"] == "FAILED"
        return bool(counted or (found and found["id"] in self.minutes))

    def unfinished(self) -> list[str]:
        """What has begun and did not end with its figure."""
        return [id for id, how in self.started.items() if how != "done"]

    def left(self) -> float:
        """Seconds that it may still take: by the expected minutes, and by how these held so far."""
        waiting = [minutes for id, minutes in self.minutes.items() if id not in self.ended]
        number = self.total - len(self.ended)
        if not waiting or number <= 0:
            return 0.0
        expected = 60 * sum(waiting) * number / len(waiting)  # where some are up to date, nobody said which
        known = 60 * sum(self.minutes[id] for id in self.ended)
        ratio = sum(self.ended.values()) / known if known else 1.0
        under_way = (time.monotonic() - self.began) * self.jobs - sum(self.ended.values())
        return max(0.0, ratio * expected - max(0.0, under_way)) / min(self.jobs, number)

    def line(self) -> str:
        """All of it in a line."""
        failed = f", {self.failed} failed" if self.failed else ""
        left = f", about {duration(self.left())} left" if len(self.ended) < self.total else ""
        return f"{len(self.ended)} of {self.total} figures{failed}, {duration(time.monotonic() - self.began)}{left}"


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(42), duration(400), duration(9000)
        ('42 s', '7 min', '2 h 30 min')
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def chosen(ids: Sequence[str], preset: str) -> dict[str, float]:
    """Expected minutes of the notebooks that have a preset, or of those that are named.

    Raises BatchError for a notebook that is none, or has no such preset, and where no notebook has it.
    """
    for id in ids:
        notebooks.chosen(id, preset)
    found = {id: notebooks.presets(id) for id in ids or notebooks.ids()}
    having = {id: of[preset].minutes for id, of in found.items() if preset in of}
    if not having:
        every = {name for of in found.values() for name in of}
        raise notebooks.BatchError(f"no notebook has a preset {preset!r}; known are {', '.join(sorted(every))}")
    return having


def not_done(
    ids: Sequence[str],
    preset: str,
    label: str,
    files: Sequence[Path] = (),
    overrides: Mapping[str, str] | None = None,
) -> list[str]:
    """Of the notebooks that have a preset, or of those named, the ones whose record another code or no one made.

    So are those whose record has other values than are asked for: under a label of one's own nothing else sets them.
    What snakemake was told of them is forgotten, since it goes by times, which a clock and a copy may turn back.
    """
    found = []
    for id in chosen(ids, preset):
        values = notebooks.plan(id, preset, files, overrides, label)
        if freshness.state(id, label) != "done" or not freshness.has_values(id, label, values):
            found.append(id)
            (paths.figures_dir() / label / ".batch" / id).unlink(missing_ok=True)
    return found


def build(
    ids: Sequence[str], preset: str, label: str, jobs: int, gpus: int, given: str = "", within: float = math.inf
) -> int:
    """Build figures on this machine; 0 when all are there, 1 when one failed, 130 after Ctrl-C, 75 when time is up.

    After `within` minutes what is under way is ended, and the same call goes on: figures that are there stay, results
    come from the cache, fine-tuning from its checkpoint. The longest figures start first, so that they have all of it.

    `given` holds arguments of `python -m compressible run`, as a shell would take them. What snakemake writes goes to
    figures/<label>/.batch/log.txt. Raises BatchError or ParameterError, before anything starts, for what is refused.
    """
    minutes = chosen(ids, preset)
    root, began = Path(os.path.relpath(paths.figures_dir())), time.time()
    log = root / label / ".batch" / "log.txt"
    batch.expect_room(log.parent)
    batch.warn_of_cache()
    progress = Progress(minutes, jobs, len(minutes))
    with log.open("wb", buffering=0) as out:  # what a full disk does not take is not tried again at the end
        command = _command(ids, preset, label, jobs, gpus)
        status = _follow(command, given, out, progress, time.monotonic() + 60 * within)
    reached = status == 0 or len(progress.started) >= progress.total
    try:
        index.write_index(root, label, began)
    except OSError as error:
        print(f"no page of this run: {checks.one_line(error)}", file=sys.stderr)
    print(*index.summary(root, label, began, list(minutes), progress.unfinished(), reached), sep="\n")
    if status == TIME_IS_UP:
        print(f"time is up after {within:g} minutes: the same command goes on", file=sys.stderr)
    elif status not in (0, STOPPED) and not progress.failed:
        print(f"the batch ended early: {_reason(log)}; all that it wrote: {log}", file=sys.stderr)
    return status if status in (0, STOPPED, TIME_IS_UP) else 1


def _command(ids: Sequence[str], preset: str, label: str, jobs: int, gpus: int) -> list[str]:
    # A batch that was killed leaves a lock behind, which guards nothing here: every job publishes its files whole or
    # not at all.
    options = ["--nolock", "--keep-going", "--rerun-incomplete", "--scheduler", "greedy", "--nocolor"]
    counts = ["--cores", str(jobs), "--resources", f"gpu={gpus}"]
    values = [f"preset={preset}", f"label={label}", f"gpus={gpus}", f"ids={' '.join(ids)}"]
    return [sys.executable, "-P", guard.__file__, *options, *counts, "--config", *values]


def _follow(command: Sequence[str], given: str, out: IO[bytes], progress: Progress, until: float = math.inf) -> int:
    """Run snakemake, keep what it writes, and show how far it is.

    At `until`, of time.monotonic, and soon after a Ctrl-C it is ended with all that it started; so it is when this
    process ends, however.
    """
    # Jobs are calls of `python`: of this one, also where its environment was not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    told = os.environ | {"PATH": path, "COMPRESSIBLE_ARGS": given, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=paths.repository(), env=told, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        stopped = late = False
        lines = _Lines(process.stdout)
        while True:
            try:
                for line in lines:
                    _show(line, out, progress)
                    if not late and time.monotonic() > until:
                        late = True
                        guard.end(process.pid)
                break
            except KeyboardInterrupt:
                # A terminal's goes to all of the batch, which ends by itself. Where it came to this process alone,
                # snakemake is told to start nothing more, and what is under way is ended a little later.
                process.terminate()
                stopped, late, until = True, False, min(until, time.monotonic() + PATIENCE)
                print("\nstopping: what is under way is ended", file=sys.stderr)
    return STOPPED if stopped else TIME_IS_UP if late else process.returncode


class _Lines:
    """The lines of a stream as they come, and "" once a second where none does, so that a clock can go on."""

    def __init__(self, stream: IO[str]) -> None:
        self._queue: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._queue.put(line)
        self._queue.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line = self._queue.get(timeout=1)
        except queue.Empty:
            return ""
        if line is None:
            raise StopIteration
        return line


def _show(line: str, out: IO[bytes], progress: Progress) -> None:
    """Keep a line, and say how far it is: in a terminal on one line, else whenever a figure has ended."""
    with contextlib.suppress(OSError):  # a full disk: the batch goes on, and says what came of it
        out.write(line.encode())
    news = progress.note(line)
    if sys.stderr.isatty():
        end = "\n" if news and len(progress.ended) == progress.total else ""
        print(f"\r\x1b[K{progress.line()}", end=end, file=sys.stderr, flush=True)
    elif news and ENDED.match(line):
        print(f"{progress.line()}: {line.strip()}", file=sys.stderr, flush=True)


def _reason(log: Path) -> str:
    """What snakemake said last, without the places in its own code."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    told = [line for line in lines if line and not line.startswith(("File ", "Complete log", "Elapsed", "Traceback"))]
    return " ".join(told[-3:])[:400] or "it said nothing"
