"""Many figures by one call: progress, the last lines, failures, Ctrl-C, refusals, kernels that do not fit."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
from conftest import REPOSITORY, SAVE, write_notebook

from compressible.companion import build, freshness, kernels
from compressible.companion.command_line import main


@pytest.fixture
def batch_of(add_notebook, checkout):
    """Two notebooks, good and bad, and what the batch needs beside them."""
    shutil.copy(REPOSITORY / "Snakefile", checkout)
    return add_notebook("00_bad", "raise RuntimeError('as intended')"), add_notebook("01_good")


def test_a_batch_says_in_few_lines_what_was_built_where_and_what_failed(batch_of, capfd):
    bad, good = batch_of
    assert main(["build", "--jobs", "2"]) == 1
    said = capfd.readouterr()
    told = said.out.splitlines()
    assert told[0] == f"built: {good}" and told[-1] == "to look at: figures/quick/index.html"
    (failed,) = [line for line in told if line.startswith("failed: ")]
    assert failed == f"failed: {bad}: RuntimeError: as intended; log: figures/quick/failed/{bad}.txt"
    assert Path("figures/quick/index.html").is_file()
    lines = said.err.splitlines()  # one for each figure that ended, and nothing of snakemake's or of a kernel's log
    assert len(lines) == 2 and lines[1].startswith("2 of 2 figures, 1 failed, "), said.err
    assert "rule figure" in Path("figures/quick/.batch/log.txt").read_text()
    write_notebook(Path("notebooks", f"{bad}.ipynb"), SAVE.format(id=bad))
    assert main(["build"]) == 0
    said = capfd.readouterr()
    assert said.out.splitlines()[:2] == [f"built: {bad}", f"as it was, up to date: {good}"]
    assert said.err.startswith("1 of 1 figures, ")


@pytest.mark.parametrize(
    ("arguments", "given", "told"),
    [
        (["kwon2024/99_absent"], "", "no notebook 'kwon2024/99_absent'"),
        (["--preset", "papr"], "", "no notebook has a preset 'papr'; known are paper, quick"),
        (["kwon2024/01_good", "--preset", "papr"], "", "no preset 'papr'; the closest is 'paper'"),
        (["--label", "a b"], "", "label: got 'a b'"),
        ([], "-p rank many", "rank: got 'many'"),
        ([], "-p rank '", """ARGS is "-p rank '" (No closing quotation), expected such as -p rank 10"""),
        (["--jobs", "0"], "", "--jobs is 0, expected an integer from 1"),
        (["--gpus", "-1"], "", "--gpus is -1, expected an integer from 0"),
        (["--within", "0"], "", "--within is 0.0, expected minutes above 0"),
    ],
)
def test_a_batch_refuses_in_a_line_and_starts_nothing(arguments, given, told, batch_of, capfd, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_ARGS", given)
    monkeypatch.setattr(build, "_follow", lambda *_: pytest.fail("something was started"))
    assert main(["build", *arguments]) == 2
    said = capfd.readouterr()
    assert told in said.err and "Traceback" not in said.err and not Path("figures").exists()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"LABEL": "it's mine"}, {"label": "it's mine"}),
        ({"GPUS": "-1"}, {"gpus": "-1", "jobs": "-1"}),
        ({"GPUS": "4"}, {"gpus": "4", "jobs": "4"}),
        ({"GPUS": ""}, {"gpus": "", "jobs": ""}),
        ({"GPUS": "0 1"}, {"gpus": "0 1", "jobs": "2"}),
        ({"GPUS": "one"}, {"gpus": "one", "jobs": "one"}),
        ({"ID": "kwon2024/05_it's; touch made"}, {}),
        ({"PRESET": "-h", "JOBS": "$(touch made)"}, {"preset": "-h", "label": "-h", "jobs": "$(touch made)"}),
    ],
)
def test_make_hands_variables_over_as_they_are(variables, told, tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    # Of a make that runs these tests, nothing is inherited.
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PRESET", "LABEL", "JOBS", "GPUS", "ID")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    given = [f"{name}={value.replace('$', '$$')}" for name, value in variables.items()]
    done = subprocess.run(
        ["make", "-s", "-o", "none/.stamp", "figures", "VENV=none", *given],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(done.stdout.splitlines()) >= {f"--{name}={value}" for name, value in told.items()}
    assert set(done.stdout.splitlines()) >= set(variables.get("ID", "").split())
    assert not (REPOSITORY / "made").exists()


def test_a_batch_that_cannot_begin_says_why(batch_of, capfd):
    Path("Snakefile").write_text("raise WorkflowError('of no use')\n")
    assert main(["build", "kwon2024/01_good"]) == 1
    said = capfd.readouterr()
    assert "not reached: kwon2024/01_good" in said.out
    assert "the batch ended early: " in said.err and "of no use" in said.err and "Traceback" not in said.err


def test_jobs_run_the_python_of_the_command_whatever_the_path_has_first(batch_of, tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 3\n")  # as where the environment was not activated
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert main(["build", batch_of[1]]) == 0


@pytest.mark.parametrize("command", ["run", "build"])
def test_a_cache_that_cannot_be_written_is_said_at_the_command_line(command, batch_of, capfd, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_CACHE", os.devnull)
    assert main([command, batch_of[1]]) == 0
    said = capfd.readouterr().err
    assert said.startswith("warning: the cache /dev/null cannot be written (") and said.count("warning: ") == 1


def test_ctrl_c_ends_a_batch_with_its_last_lines_and_the_earlier_figure(batch_of, checkout, add_notebook):
    _, good = batch_of
    call = [sys.executable, "-m", "compressible", "build", good]
    assert subprocess.run(call, check=False, capture_output=True).returncode == 0
    before = Path(f"figures/quick/{good}.json").read_bytes()
    add_notebook("01_good", "import time; time.sleep(60)")
    before_it = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has set it aside
    batch = subprocess.Popen(call, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before_it)
    deadline = time.monotonic() + 60
    while not list(Path("figures/quick").glob(".staging-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    os.killpg(batch.pid, signal.SIGINT)
    out, err = batch.communicate(timeout=60)
    assert batch.returncode == build.STOPPED, out + err + Path("figures/quick/.batch/log.txt").read_text()
    assert "Traceback" not in out + err
    assert "to look at: figures/quick/index.html" in out
    assert f"built: nothing\nnot finished: {good}\n" in out  # and not "up to date"
    assert Path(f"figures/quick/{good}.json").read_bytes() == before


def test_an_interrupt_of_the_command_alone_ends_what_it_started_and_starts_no_more(batch_of, add_notebook):
    both = [add_notebook(name, "import time; time.sleep(300)") for name in ("00_bad", "01_good")]
    call = [sys.executable, "-m", "compressible", "build", *both, "--jobs", "1"]
    before_it = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has set it aside
    batch = subprocess.Popen(call, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before_it)
    assert until(lambda: list(Path("figures/quick").glob(".staging-*/notebook.ipynb")), 60)
    started = psutil.Process(batch.pid).children(recursive=True)
    batch.send_signal(signal.SIGINT)  # not to its group, as a supervisor or `kill -INT` sends it
    out, err = batch.communicate(timeout=60)
    assert batch.returncode == build.STOPPED and "Traceback" not in out + err, out + err
    assert out.startswith("built: nothing\nnot finished: ") and "\nnot reached: " in out
    assert not any(map(psutil.Process.is_running, started)) and not list(Path("figures/quick").glob(".staging-*"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda how: how.name)
def test_a_batch_whose_command_is_killed_ends_with_all_that_it_started(how, batch_of, add_notebook):
    slow, good = batch_of
    add_notebook("00_bad", "import time; time.sleep(300)")
    call = [sys.executable, "-m", "compressible", "build", slow, good, "--jobs", "1"]
    before_it = None if how == signal.SIGKILL else signal.signal(how, signal.SIG_DFL)  # nohup has set it aside
    batch = subprocess.Popen(call, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if before_it is not None:
        signal.signal(how, before_it)
    assert until(lambda: any("sleep(300)" in text for text in under_way()), 60)
    reached = Path(f"figures/quick/{good}.json").exists()  # snakemake may have taken it first
    assert until(lambda: len(psutil.Process(batch.pid).children(recursive=True)) >= 3, 60)  # snakemake, job and kernel
    started = psutil.Process(batch.pid).children(recursive=True)
    batch.send_signal(how)
    assert batch.wait(timeout=60) == -how
    assert until(lambda: not any(map(psutil.Process.is_running, started)), 60), [each.cmdline() for each in started]
    assert not list(Path("figures/quick").glob(".staging-*"))
    assert Path(f"figures/quick/{good}.json").exists() == reached


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_batch_on_a_full_disk_says_what_came_of_it(batch_of, capfd, monkeypatch):
    _, good = batch_of
    write, full = build.Path.open, OSError(errno.ENOSPC, "No space left on device")

    def on_full_disk(self, *given, **named):
        if self.name != "log.txt":
            return write(self, *given, **named)
        monkeypatch.setattr(build.index.paths, "write_atomic", Mock(side_effect=full))  # from now on
        return open("/dev/full", *given, **named)

    monkeypatch.setattr(build.Path, "open", on_full_disk)
    assert main(["build", good]) == 0
    said = capfd.readouterr()
    assert said.out.startswith(f"built: {good}\n") and "no page of this run: OSError: [Errno 28]" in said.err


def under_way() -> list[str]:
    """The notebooks that jobs of a batch execute."""
    found = []
    for file in Path("figures/quick").glob(".staging-*/notebook.ipynb"):
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            found.append(file.read_text())
    return found


def until(holds: Callable[[], object], seconds: float) -> bool:
    """Whether something holds in time."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.2)
    return bool(holds())


def test_the_time_that_is_left_follows_what_the_figures_have_taken(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(build.time, "monotonic", lambda: now[0])
    progress = build.Progress({"a/1": 1.0, "a/2": 1.0, "a/3": 2.0}, jobs=2, total=3, began=0.0)
    assert progress.left() == 120
    assert not progress.note("Job 3: a/1, preset quick\n") and not progress.note("b/9: done after 3 s\n")
    now[0] = 30.0
    assert progress.note("a/1: done after 30 s\n") and progress.note("a/2: FAILED after 30 s; preset x needs y\n")
    assert progress.left() == 60 and progress.line() == "2 of 3 figures, 1 failed, 30 s, about 60 s left"
    now[0] = 500.0
    assert progress.left() == 0
    assert progress.note("figure            2\n") and progress.total == 2 and "left" not in progress.line()


def test_the_list_shows_one_s_own_labels(batch_of, capsys):
    _, good = batch_of
    assert main(["run", good, "--label", "mine", "-p", "rank", "4"]) == 0
    assert main(["run", batch_of[0], "--label", "other"]) == 1
    capsys.readouterr()
    assert main(["list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [good, "mine", "-", "-", "unknown"] in rows and [batch_of[0], "other", "-", "-", "failed"] in rows
    record = Path(f"figures/mine/{good}.json")
    code = {"notebook": "f" * 64, "library": freshness.LIBRARY, "parameters": {"rank": 4}}
    record.write_text(json.dumps(code))
    assert freshness.state(good, "mine") == "stale"
    code["notebook"] = freshness.notebook_digest(Path(f"notebooks/{good}.ipynb"))
    record.write_text(json.dumps(code))
    assert freshness.state(good, "mine") == "done"


def write_kernel(folder: Path, name: str, content: str) -> None:
    place = folder / "kernels" / name
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(content)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"argv": ["R", "{connection_file}"], "language": "R"}, "is for 'R', expected python"),
        ({"argv": ["/gone/bin/python", "-m", "x"], "language": "python"}, "'/gone/bin/python', which is not there"),
        ({"argv": ["{other}", "-m", "x"], "language": "python"}, "which lacks ipykernel, torch, matplotlib, seaborn"),
        ({"argv": ["{broken}", "-m", "x"], "language": "python"}, "which does not run: exit status 3"),
        ("no json", "cannot be read"),
    ],
)
def test_a_kernel_of_another_place_is_refused_with_what_to_do(
    content, told, tmp_path, monkeypatch, add_notebook, capsys
):
    other, broken = tmp_path / "python3.11", tmp_path / "python3.99"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')  # a Python without any package
    broken.write_text("#!/bin/sh\nexit 3\n")
    for program in (other, broken):
        program.chmod(0o755)
    text = content if isinstance(content, str) else json.dumps({"display_name": "x", **content})
    write_kernel(tmp_path, "python3", text.replace("{other}", str(other)).replace("{broken}", str(broken)))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert main(["run", add_notebook("01_good"), "--check"]) == 2
    said = capsys.readouterr().err
    assert told in said and f"`{sys.executable} -m ipykernel install --sys-prefix`" in said and said.count("\n") == 1


def test_a_kernel_of_this_python_is_taken_whatever_its_name(tmp_path, monkeypatch):
    for name, program in (("mine", sys.executable), ("plain", "python"), ("wrapper", "env")):
        text = json.dumps({"argv": [program, "-m", "ipykernel_launcher"], "language": "python", "display_name": name})
        write_kernel(tmp_path, name, text)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    for name in ("mine", "plain", "wrapper", "python3"):
        kernels.check_kernel(name)


def test_the_reason_of_a_failure_is_the_error_s_own_line(batch_of, capfd):
    bad, _ = batch_of
    write_notebook(Path("notebooks", f"{bad}.ipynb"), "raise RuntimeError('no such file\\nwhat to do: nothing')")
    assert main(["build", bad]) == 1
    assert f"failed: {bad}: RuntimeError: no such file; log: " in capfd.readouterr().out


def test_a_batch_ends_in_time_and_the_same_call_goes_on(batch_of, add_notebook, capfd):
    slow, good = batch_of
    add_notebook("00_bad", "import time; time.sleep(120)")
    assert main(["build", good]) == 0
    before = Path(f"figures/quick/{good}.json").read_bytes()
    began = time.monotonic()
    assert main(["build", slow, "--within", "0.3"]) == build.TIME_IS_UP
    assert time.monotonic() - began < 60
    assert "time is up after 0.3 minutes: the same command goes on" in capfd.readouterr().err
    assert not list(Path("figures/quick").glob(".staging*")), "what was under way left no half-made figure"
    assert Path(f"figures/quick/{good}.json").read_bytes() == before
    add_notebook("00_bad", SAVE.format(id=slow))
    assert main(["build", slow, "--within", "9"]) == 0 and Path(f"figures/quick/{slow}.json").is_file()


@pytest.mark.parametrize("given", ["--label other", "--check", "--preset paper", "-h", "kwon2024/00_bad", "--gpus 1"])
def test_what_the_batch_says_itself_is_not_handed_on(given, batch_of, capfd, monkeypatch):
    """A run with another label leaves its figure where the batch does not look; one with --check makes none."""
    monkeypatch.setenv("COMPRESSIBLE_ARGS", given)
    with pytest.raises(SystemExit) as refused:
        main(["build", "kwon2024/01_good"])
    assert refused.value.code == 2 and "ARGS: error: unrecognized arguments: " + given in capfd.readouterr().err
    assert not Path("figures").exists()


def test_resuming_makes_figures_of_other_values_anew(batch_of, monkeypatch, capfd):
    """Under a label of one's own, where nothing but the call says which values are meant."""
    _, good = batch_of
    asked = []
    monkeypatch.setattr(build, "build", lambda ids, *_: asked.append(list(ids)) or 0)
    record = Path(f"figures/mine/{good}.json")
    record.parent.mkdir(parents=True)
    values = {"rank": 3, "step_size": 0.1, "ranks": [1, 2]}
    code = {"notebook": freshness.notebook_digest(Path(f"notebooks/{good}.ipynb")), "library": freshness.LIBRARY}
    record.write_text(json.dumps(code | {"parameters": values}))
    stamp = Path("figures/mine/.batch", good)
    stamp.parent.mkdir(parents=True)
    for given, anew in (("-p rank 3", []), ("-p rank 4", [[good]]), ("", [[good]])):
        stamp.touch()
        asked.clear()
        monkeypatch.setenv("COMPRESSIBLE_ARGS", given)
        assert main(["build", good, "--label", "mine", "--resume"]) == 0
        assert asked == anew and stamp.exists() == (not anew), given


def test_resuming_leaves_figures_whose_records_are_of_this_code(batch_of, monkeypatch, capfd):
    bad, good = batch_of
    asked = []
    monkeypatch.setattr(build, "build", lambda ids, *_: asked.append(list(ids)) or 0)
    monkeypatch.setattr(freshness, "state", lambda id, label: "done" if id == good else "missing")
    monkeypatch.setattr(freshness, "has_values", lambda *_: True)
    assert main(["build", "--resume"]) == 0 and asked == [[bad]]
    assert main(["build", good, "--resume"]) == 0 and asked == [[bad]]
    assert capfd.readouterr().out == "all figures of quick are of the code that is here\n"
