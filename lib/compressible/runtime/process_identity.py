"""Names of processes for what they write half: what one left that is no more is told from what others still write."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path

BOOT, TABLE, PROCESSES = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid"), Path("/proc")
PATTERN = r"(?:[0-9a-f]{16}|x)-\d+-\d+"  # of a name


def identity() -> str:
    """A name that no other process has: system, number and start, as a number is given again; "x" for one unknown."""
    here, start = system(), _told("self")[1]
    return f"{here or 'x'}-{os.getpid()}-{start}"


def is_gone(name: str) -> bool:
    """Whether the process of that name was one of this very system and is no more; all others may be at work.

    These are on another host, in another container, or of before a restart.
    """
    here = system()
    found = re.fullmatch(rf"{here}-(\d+)-(\d+)", name) if here else None
    return bool(found) and not _is_alive(int(found[1]), found[2])  # type: ignore[index]


def system() -> str:
    """Names this host, its boot and its table of processes, within which a number means one process; "" if unknown."""
    try:
        if os.readlink(PROCESSES / "self") != str(os.getpid()):  # the numbers there are of another table
            return ""
        told = f"{platform.node()} {BOOT.read_text().strip()} {os.readlink(TABLE)}"
    except OSError:
        return ""
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _is_alive(pid: int, start: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # someone else's, or no number of a process: not ours to judge
        return True
    state, began = _told(str(pid))
    return state not in ("Z", "X") and began in (start, "0")  # one that has ended may still wait for its parent


def _told(process: str) -> tuple[str, str]:
    """State and start of a process, in ticks since boot; "?" and "0" where the system does not say."""
    try:
        fields = (PROCESSES / process / "stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return "?", "0"
    return fields[0], fields[19]
