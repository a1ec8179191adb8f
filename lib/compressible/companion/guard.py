"""Snakemake that ends, with all that it started, as soon as the command that wanted it is gone.

Killed, or left by its terminal, that command could not say so. What it started would go on unseen beside the next call,
or wait for ever for someone who reads what it writes. Here the command holds the other end of the standard input: when
that is closed, by whatever end, the batch is over. This file is run as a script, with snakemake's options, and imports
nothing of the library, since the Snakefile takes that from its own checkout.
"""

from __future__ import annotations

import contextlib
import os
import threading


def main() -> None:
    """Run snakemake for as long as the standard input is open."""
    threading.Thread(target=_watch, daemon=True).start()
    from snakemake.cli import main as snakemake  # type: ignore[import-untyped]

    snakemake()


def _watch() -> None:
    while os.read(0, 1024):  # nothing is ever written: this waits for the end
        pass
    end(os.getpid())
    os._exit(1)


def end(pid: int, patience: float = 10) -> None:
    """End a process and all that it started: politely, which leaves no half-made figure, and by force after a while.

    The process is asked first, so that it starts nothing more. One that ends itself is not waited for.
    """
    import psutil  # snakemake brings it

    parent = psutil.Process(pid)
    every = [parent, *parent.children(recursive=True)]
    for way in (psutil.Process.terminate, psutil.Process.kill):
        for process in every:
            with contextlib.suppress(psutil.NoSuchProcess):
                way(process)
        _, every = psutil.wait_procs([each for each in every if each.pid != os.getpid()], timeout=patience)


if __name__ == "__main__":
    main()
