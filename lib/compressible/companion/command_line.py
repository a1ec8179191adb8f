"""Figures from notebooks, and what is known of them: records, claims, pages, data, releases."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from compressible.companion import batch, build, gpu_slots, kernels, label_guard, notebooks, overview, publishing
from compressible.companion.parameters import ParameterError
from compressible.runtime import checks, paths


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; exit status 0 when done, 1 when a notebook failed, 2 when refused before work."""
    arguments = _parser().parse_args(argv)
    os.environ.update(paths.absolute_places())
    try:
        return arguments.command(arguments)
    except (notebooks.BatchError, ParameterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # of an extra, which nobody needs for the library alone
        if error.name is None or error.name.partition(".")[0] == "compressible":
            raise
        print(f"error: {checks.lacking(error)}", file=sys.stderr)
        return 2
    except (OSError, ValueError, RuntimeError) as error:  # outside of a checkout, say, or a data manifest that is none
        print(f"error: {checks.one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m compressible", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    overview.add_list(commands)
    _add_run(commands.add_parser("run", help="execute one notebook with papermill and keep its figure"))
    _add_build(commands.add_parser("build", help="execute many notebooks, side by side, and keep their figures"))
    redraw = commands.add_parser("redraw", help="draw a figure anew from its record, without computing")
    redraw.add_argument("id", metavar="ID", help="such as kwon2024/05_completion")
    redraw.add_argument("--preset", default="paper", help="folder below figures/ that has the record (default: paper)")
    redraw.add_argument("--kernel", default="python3", help="Jupyter kernel (default: python3)")
    redraw.set_defaults(command=_redraw)
    overview.add_pages(commands)
    publishing.add(commands)
    overview.add_data(commands)
    refresh = commands.add_parser("notebooks", help="re-execute the committed notebooks in place")
    refresh.add_argument("ids", nargs="*", metavar="ID", help="which ones (default: all)")
    refresh.set_defaults(command=_notebooks)
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument("id", metavar="ID", help="such as kwon2024/05_completion")
    run.add_argument("--preset", default="quick", help="set of parameters to start from (default: quick)")
    run.add_argument("--label", help="folder below figures/ to save under (default: the preset's name)")
    _add_values(run)
    run.add_argument("--gpus", type=int, help="GPUs that the batch shares: wait for a free one; 0 hides them")
    run.add_argument("--check", action="store_true", help="check the values and start nothing")
    run.set_defaults(command=_run)


def _add_values(run: argparse.ArgumentParser) -> None:
    """What a batch hands on to each of its runs: all else is the batch's own."""
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="values")
    run.add_argument("-f", action="append", default=[], metavar="FILE", type=Path, dest="files",
                     help="YAML file of parameters")  # fmt: skip
    run.add_argument("--kernel", default="python3", help="Jupyter kernel (default: python3)")


def handed_on(given: str) -> list[str]:
    """The arguments that a batch hands on to each run, of a text as a shell would take it.

    With another label, say, a run would leave its figure where the batch does not look. Raises BatchError for a text
    that no shell takes, and SystemExit, with the usage on standard error, for what is no value, file or kernel.
    """
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise notebooks.BatchError(f"ARGS is {given!r} ({error}), expected such as -p rank 10") from None
    _values(words)
    return words


def _values(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("ARGS", add_help=False)
    _add_values(parser)
    return parser.parse_args(words)


def _add_build(build: argparse.ArgumentParser) -> None:
    build.add_argument("ids", nargs="*", metavar="ID", help="which ones (default: all that have the preset)")
    build.add_argument("--preset", default="quick", help="set of parameters to start from (default: quick)")
    build.add_argument("--label", help="folder below figures/ to save under (default: the preset's name)")
    build.add_argument("--jobs", type=int, default=2, help="how many at a time (default: 2)")
    build.add_argument("--gpus", type=int, default=0, help="GPUs of this machine, one a job; 0 hides them (default: 0)")
    build.add_argument("--resume", action="store_true", help="leave figures whose records are of the code that is here")
    build.add_argument("--within", type=float, default=math.inf, metavar="MINUTES", help="end after so long with "
                       "status 75; the same call goes on")  # fmt: skip
    build.set_defaults(command=_build)


def _run(arguments: argparse.Namespace) -> int:
    given = _each_once(arguments.values)
    values = notebooks.plan(arguments.id, arguments.preset, arguments.files, given, arguments.label)
    if note := label_guard.expect_of_commit(arguments.id, values):
        print(note, file=sys.stderr)
    kernels.check_kernel(arguments.kernel)
    if arguments.gpus is not None:
        checks.expect_integer("--gpus", arguments.gpus, 0, 10_000)
    if arguments.check:
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leave by the way that cleans up
    batch.warn_of_cache()
    slot = contextlib.nullcontext() if arguments.gpus is None else gpu_slots.gpu_slot(arguments.gpus)
    started = time.perf_counter()
    with slot:
        done = batch.run(arguments.id, values, arguments.kernel)
    needs = "" if done else notebooks.presets(arguments.id)[arguments.preset].needs
    print(f"{arguments.id}: {'done' if done else 'FAILED'} after {time.perf_counter() - started:.0f} s"
          f"{f'; preset {arguments.preset} needs {needs}' if needs else ''}")  # fmt: skip
    return 0 if done else 1


def _build(arguments: argparse.Namespace) -> int:
    label, given = arguments.label or arguments.preset, os.environ.get("COMPRESSIBLE_ARGS", "").strip()
    checks.expect_integer("--jobs", arguments.jobs, 1, 10_000)
    checks.expect_integer("--gpus", arguments.gpus, 0, 10_000)
    checks.expect("--within", arguments.within, arguments.within > 0, "minutes above 0")
    words = handed_on(given)
    for id in build.chosen(arguments.ids, arguments.preset):
        named = ["--preset", arguments.preset, "--label", label]
        if status := main(["run", id, *named, "--check", *words]):
            print(f"{id} refuses these values, and nothing was started", file=sys.stderr)
            return status
    ids = arguments.ids
    if arguments.resume:
        asked = _values(words)
        ids = build.not_done(ids, arguments.preset, label, asked.files, _each_once(asked.values))
    if arguments.resume and not ids:
        print(f"all figures of {label} are of the code that is here")
        return 0
    return build.build(ids, arguments.preset, label, arguments.jobs, arguments.gpus, given, arguments.within)


def _each_once(pairs: Sequence[Sequence[str]]) -> dict[str, str]:
    """The values of -p by name; BatchError where a name comes twice."""
    names = [name for name, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise notebooks.BatchError(f"-p {twice[0]} comes {names.count(twice[0])} times: which value is meant?")
    return {name: value for name, value in pairs}


def _redraw(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    kernels.check_kernel(arguments.kernel)
    batch.redraw(arguments.id, arguments.preset, arguments.kernel)
    print(f"{arguments.id}: drawn from its record in {time.perf_counter() - started:.0f} s")
    return 0


def _notebooks(arguments: argparse.Namespace) -> int:
    chosen = arguments.ids or notebooks.ids()
    for id in chosen:
        notebooks.notebook_path(id)
    kernels.check_kernel("python3")
    failed = 0
    for id in chosen:
        failed += not _refresh(id)
    return 1 if failed else 0


def _refresh(id: str) -> bool:
    started = time.perf_counter()
    try:
        batch.refresh(id)
    except Exception as error:  # the other notebooks go on, whatever stops one
        print(f"{id}: FAILED\n{batch.ANSI.sub('', str(error))}", file=sys.stderr)
        return False
    print(f"{id}: executed in {time.perf_counter() - started:.0f} s")
    return True


def until_stopped() -> int:
    """Run the command line; 130 after Ctrl-C, as a shell has it, with a word instead of a traceback."""
    try:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # no longer that of the time of imports
        return main()
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # what became of a kernel that was interrupted, too
        print("stopped", file=sys.stderr)
        return build.STOPPED
