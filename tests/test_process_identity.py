"""Names of processes: one that is no more is known to be gone, all others count as alive."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compressible.runtime import process_identity

NAME = "from compressible.runtime import process_identity; print(process_identity.identity(), flush=True)"
HELD = f"{NAME}; input()"

pytestmark = pytest.mark.skipif(not process_identity.system(), reason="this system does not say which one it is")


def test_a_process_is_gone_when_it_has_ended_also_while_its_parent_has_not_asked():
    process = subprocess.Popen([sys.executable, "-c", HELD], stdin=-1, stdout=-1, text=True)
    try:
        name = process.stdout.readline().strip()
        assert name.startswith(f"{process_identity.system()}-{process.pid}-") and not process_identity.is_gone(name)
    finally:
        process.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
    assert process_identity.is_gone(name)
    process.communicate()
    assert process_identity.is_gone(name)


def test_a_number_that_was_given_again_is_another_process():
    here, pid, start = process_identity.identity().split("-")
    assert not process_identity.is_gone(f"{here}-{pid}-{start}")
    assert process_identity.is_gone(f"{here}-{pid}-{int(start) - 1}")


def test_what_is_not_known_counts_as_alive(tmp_path, monkeypatch):
    gone = subprocess.run([sys.executable, "-c", NAME], capture_output=True, text=True, check=True).stdout.strip()
    here, pid, start = gone.split("-")
    assert process_identity.is_gone(gone)
    names = [
        f"{'0' * 16}-{pid}-{start}",  # of another host, or of before a restart
        f"x-{pid}-0",  # of a system that does not say which one it is
        f"{here}-{pid}",
        f"{here}-{'1' * 30}-{start}",  # no number of a process
    ]
    assert not any(map(process_identity.is_gone, names))
    for place in ("BOOT", "TABLE"):
        with monkeypatch.context() as patch:
            patch.setattr(process_identity, place, tmp_path / "absent")
            assert not process_identity.is_gone(gone) and process_identity.identity().startswith(f"x-{os.getpid()}-")


def test_processes_that_are_hidden_count_as_alive(tmp_path, monkeypatch):
    here, pid, start = process_identity.identity().split("-")
    (tmp_path / "self").symlink_to(pid)
    monkeypatch.setattr(process_identity, "PROCESSES", tmp_path)
    assert not process_identity.is_gone(f"{here}-{pid}-{int(start) - 1}")
    assert process_identity.identity() == f"{here}-{pid}-0"


def test_a_restart_and_another_table_of_processes_are_other_systems(tmp_path, monkeypatch):
    here, boot, table = process_identity.system(), tmp_path / "boot", tmp_path / "table"
    boot.write_text("8b1d1f0c\n")
    table.symlink_to("pid:[1]")
    for place, other in (("BOOT", boot), ("TABLE", table)):
        with monkeypatch.context() as patch:
            patch.setattr(process_identity, place, other)
            assert process_identity.system() not in ("", here)
    (tmp_path / "self").symlink_to("1")  # what is mounted tells of the processes outside of a container
    monkeypatch.setattr(process_identity, "PROCESSES", tmp_path)
    assert process_identity.system() == ""
