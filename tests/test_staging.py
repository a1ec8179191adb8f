"""Folders of half-made files: those of killed jobs go, those of live ones and of other systems stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compressible.companion import staging

HOLD = """
import sys, time
from pathlib import Path
from compressible.companion import staging
with staging.folder_in(Path(sys.argv[1])) as folder:
    (folder / "half.png").write_text("x")
    print(folder, flush=True)
    time.sleep(300)
"""

pytestmark = pytest.mark.skipif(not staging.system(), reason="this system does not say which one it is")


def test_a_killed_job_s_folder_goes_with_the_next_job_and_a_live_one_s_stays(tmp_path):
    jobs = [subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) for _ in "ab"]
    try:
        folders = [Path(job.stdout.readline().strip()) for job in jobs]
        jobs[0].send_signal(signal.SIGKILL)
        jobs[0].wait()
        assert all((folder / "half.png").is_file() for folder in folders)
        with staging.folder_in(tmp_path) as mine:
            assert sorted(tmp_path.iterdir()) == sorted([folders[1], mine])
        assert list(tmp_path.iterdir()) == [folders[1]]
    finally:
        for job in jobs:
            job.kill()
            job.communicate()


def test_folders_that_another_system_or_no_job_made_stay(tmp_path, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = staging.system()
    others = [
        f".staging-{'0' * 16}-{gone.pid}-abc",  # of another host, or of before a restart
        f".staging-{here}-{os.getpid()}-abc",
        f".staging-{here}-{gone.pid}-abc-mine",
        f".staging-{here}-1{'0' * 30}-abc",
        ".staging-abcd1234",  # of an earlier version, which did not say whose it is
        "05_completion",
    ]
    for name in [*others, f".staging-{here}-{gone.pid}-abc"]:
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(staging, "BOOT", tmp_path / "absent")
        staging.forget_dead(tmp_path)
        assert len(list(tmp_path.iterdir())) == len(others) + 1
    staging.forget_dead(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("place", ["BOOT", "TABLE"])
def test_a_restart_and_another_table_of_processes_are_other_systems(place, tmp_path, monkeypatch):
    here, other = staging.system(), tmp_path / "other"
    other.write_text("8b1d1f0c\n") if place == "BOOT" else other.symlink_to("pid:[1]")
    monkeypatch.setattr(staging, place, other)
    assert staging.system() not in ("", here)
