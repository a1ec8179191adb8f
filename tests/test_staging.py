"""Folders of half-made files: those of killed jobs go, those of live ones and of other systems stay."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compressible.companion import staging
from compressible.runtime import process_identity

HOLD = """
import sys, time
from pathlib import Path
from compressible.companion import staging
with staging.folder_in(Path(sys.argv[1])) as folder:
    (folder / "half.png").write_text("x")
    print(folder, flush=True)
    time.sleep(300)
"""

pytestmark = pytest.mark.skipif(not process_identity.system(), reason="this system does not say which one it is")


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
    here, pid, start = process_identity.identity().split("-")
    gone = f"{here}-{pid}-{int(start) - 1}"  # this process has the number of one before it
    others = [
        f".staging-{'0' * 16}-{pid}-{int(start) - 1}-abc",  # of another host, or of before a restart
        f".staging-{here}-{pid}-{start}-abc",
        f".staging-{gone}-abc-mine",
        f".staging-{here}-{pid}-abc",  # of earlier versions, which said too little of whose it is
        ".staging-abcd1234",
        f"05_completion-{gone}-abc",
    ]
    for name in [*others, f".staging-{gone}-abc"]:
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(process_identity, "BOOT", tmp_path / "absent")
        staging.forget_dead(tmp_path)
        assert len(list(tmp_path.iterdir())) == len(others) + 1
    staging.forget_dead(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(others)
