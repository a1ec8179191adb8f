"""profiles/offline: jobs in lanes that go on between calls, and files that travel in parts."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest

from compressible.companion import notebooks

OFFLINE = Path(__file__).parents[1] / "profiles/offline"


def call(script: str, *arguments: str, status: int = 0, **told: str) -> str:
    command = [sys.executable, str(OFFLINE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | told, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def lanes(tmp_path):
    place = {"COMPRESSIBLE_LANES": str(tmp_path / "lanes")}
    yield lambda *arguments, status=0: call("lanes.py", *arguments, status=status, **place)
    call("lanes.py", "stop", **place)


def shows(variable: str) -> list[str]:
    return [sys.executable, "-c", f"import os, time; print(os.environ[{variable!r}]); time.sleep(0.3)"]


MEETS = """
import os, pathlib, sys, time
place, until = pathlib.Path(sys.argv[1]), time.monotonic() + 60
(place / os.environ["CUDA_VISIBLE_DEVICES"]).touch()
while len(list(place.iterdir())) < 2 and time.monotonic() < until:
    time.sleep(0.05)
print(os.environ["CUDA_VISIBLE_DEVICES"])
"""


def test_jobs_run_in_lanes_that_show_one_gpu_or_none_and_outlive_the_call(lanes, tmp_path):
    lanes("start", "--gpus", "2", "--cores", "1")
    (tmp_path / "met").mkdir()
    for name in ("a", "b"):  # each waits for the other, so that one lane cannot run both
        lanes("push", name, "--", sys.executable, "-c", MEETS, str(tmp_path / "met"))
    lanes("push", "c", "--", *shows("CUDA_VISIBLE_DEVICES"))
    lanes("push", "--on", "core", "d", "--", *shows("CUDA_VISIBLE_DEVICES"))
    told = lanes("wait", "90")
    assert "0 wait, 0 under way, 4 ended" in told and told.count(": done after") == 4
    logs = {name: (tmp_path / f"lanes/logs/{name}.log").read_text().strip() for name in "abcd"}
    assert {logs["a"], logs["b"]} == {"0", "1"} and logs["c"] in ("0", "1") and logs["d"] == ""
    ended = [json.loads(file.read_text()) for file in (tmp_path / "lanes/ended").iterdir()]
    assert {job["lane"] for job in ended} == {"gpu0a", "gpu1a", "core0"} and {job["status"] for job in ended} == {0}
    assert (tmp_path / "lanes").stat().st_mode & 0o077 == 0


def test_a_job_waits_for_those_that_it_comes_after_and_a_failure_is_told(lanes):
    lanes("start", "--cores", "2")
    lanes("push", "--on", "core", "--after", "first", "second", "--", sys.executable, "-c", "print('then')")
    assert "1 wait, 0 under way" in lanes("wait", "0.5", status=75)
    lanes("push", "--on", "core", "first", "--", *shows("PATH"))
    assert lanes("wait", "60").count("done") == 2
    lanes("push", "--on", "core", "bad", "--", sys.executable, "-c", "raise SystemExit(3)")
    lanes("push", "--on", "core", "none", "--", "/no/such/program")
    told = lanes("wait", "60", status=1)
    assert "bad: FAILED with status 3" in told and "none: FAILED with status 127" in told


def test_what_measures_time_has_its_gpu_alone(lanes, tmp_path):
    """Every other command of that GPU ends before it begins or begins after it, whichever lane is first."""
    lanes("start", "--gpus", "1", "--each", "2")
    for name in ("before", "timed", "after"):
        alone = ["--alone"] if name == "timed" else []
        lanes("push", *alone, name, "--", sys.executable, "-c", "import time; time.sleep(1)")
    assert lanes("wait", "60").count("done") == 3
    ended = [json.loads(file.read_text()) for file in (tmp_path / "lanes/ended").iterdir()]
    spans = {job["name"]: (job["began"], job["began"] + job["seconds"]) for job in ended}
    began, ended_at = spans.pop("timed")
    assert all(end <= began + 0.1 or ended_at <= start + 0.1 for start, end in spans.values()), (began, ended_at, spans)


def test_what_fails_beside_others_runs_once_more_alone(lanes, tmp_path):
    """As a second one does that the GPU's memory does not hold; one that fails alone, too, is told once."""
    lanes("start", "--gpus", "1", "--each", "2")
    lanes("push", "long", "--", sys.executable, "-c", "import time; time.sleep(2)")
    mark = f"import pathlib; p = pathlib.Path({str(tmp_path / 'mark')!r}); "
    crowded = "known = p.exists(); p.touch(); raise SystemExit(0 if known else 1)"
    lanes("push", "--again", "crowded", "--", sys.executable, "-c", mark + crowded)
    bad = "print('tried'); raise SystemExit(3)"
    lanes("push", "--again", "--after", "crowded", "bad", "--", sys.executable, "-c", bad)
    told = lanes("wait", "60", status=1)
    assert "crowded: done" in told and told.count("bad: FAILED with status 3") == 1
    assert (tmp_path / "lanes/logs/bad.log").read_text().count("tried") == 2
    jobs = [json.loads(file.read_text()) for file in (tmp_path / "lanes/ended").iterdir()]
    crowded, long = (next(job for job in jobs if job["name"] == name) for name in ("crowded", "long"))
    assert crowded["alone"] and crowded["began"] >= long["began"] + long["seconds"] - 0.1


def test_a_command_that_waits_for_its_gpu_when_lanes_stop_is_left_in_the_queue(lanes):
    lanes("start", "--gpus", "1", "--each", "2")
    lanes("push", "long", "--", sys.executable, "-c", "import time; time.sleep(600)")
    lanes("push", "--alone", "timed", "--", *shows("PATH"))
    until = time.monotonic() + 60
    while "timed: waits until its GPU is free" not in lanes("wait", "0", status=75):
        assert time.monotonic() < until
    lanes("stop")
    assert "1 wait, 0 under way, 1 ended" in lanes("wait", "0", status=75)


def test_start_twice_makes_no_lane_twice_and_stop_ends_what_runs(lanes):
    for _ in range(2):
        lanes("start", "--cores", "1")
    lanes("push", "--on", "core", "long", "--", sys.executable, "-c", "import time; time.sleep(600)")
    lanes("push", "--on", "core", "next", "--", *shows("PATH"))
    until = time.monotonic() + 60
    while "long: under way on core0" not in lanes("wait", "0", status=75):
        assert time.monotonic() < until
    lanes("stop")
    told = lanes("wait", "0", status=75)
    assert f"long: FAILED with status {-signal.SIGTERM}" in told and "1 wait, 0 under way" in told
    lanes("start", "--cores", "1")
    assert "next: done" in lanes("wait", "60", status=1)


def test_what_a_killed_lane_ran_waits_again_once_it_is_over(lanes, tmp_path):
    """As after the host has died; a command that outlives its lane alone does not run beside itself."""
    lanes("start", "--cores", "1")
    note = f"import os, pathlib; p = pathlib.Path({str(tmp_path)!r}) / str(os.getpid()); p.touch(); "
    wait = "import time; time.sleep(0 if len(list(p.parent.glob('[0-9]*'))) > 1 else 600)"
    lanes("push", "--on", "core", "long", "--", sys.executable, "-c", note + wait)
    until = time.monotonic() + 60
    while not (began := list(tmp_path.glob("[0-9]*"))):
        assert time.monotonic() < until
        time.sleep(0.1)
    command = psutil.Process(int(began[0].name))
    lane = command.parent()
    lane.kill()
    lane.wait(10)
    lanes("start", "--cores", "1")
    assert "long: under way on core0" in lanes("wait", "1", status=75) and len(list(tmp_path.glob("[0-9]*"))) == 1
    command.kill()
    lanes("start", "--cores", "1")
    assert "long: done" in lanes("wait", "60") and len(list(tmp_path.glob("[0-9]*"))) == 2


def test_what_comes_after_a_failure_is_told_and_not_waited_for(lanes):
    lanes("start", "--cores", "1")
    lanes("push", "--on", "core", "--after", "second", "third", "--", *shows("PATH"))
    assert "third: waits for second, which nobody has pushed" in lanes("wait", "0", status=75)
    lanes("push", "--on", "core", "--after", "first", "second", "--", *shows("PATH"))
    lanes("push", "--on", "core", "first", "--", "false")
    told = lanes("wait", "60", status=1)
    assert "second: cannot begin, since first failed or cannot" in told
    assert "third: cannot begin, since second failed or cannot" in told and "2 wait, 0 under way, 1 ended" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["start"], "--gpus is 0, --each 1 and --cores 0, expected a GPU or a core at least"),
        (["start", "--gpus", "-1"], "--gpus is -1"),
        (["start", "--gpus", "1", "--each", "0"], "--each 0"),
        (["wait", "nan"], "seconds is nan, expected a number"),
    ],
)
def test_numbers_that_mean_no_lane_and_no_time_are_refused(arguments, told, lanes):
    assert told in lanes(*arguments, status=1)


@pytest.mark.parametrize("name", ["", "a b", "../a", "a/b"])
def test_odd_names_are_refused(lanes, name):
    assert "expected a name of letters" in lanes("push", name, "--", "true", status=1)


def test_a_name_comes_once(lanes):
    lanes("push", "one", "--", "true")
    assert "name is 'one', expected one that no job has had" in lanes("push", "one", "--", "true", status=1)


def test_published_files_and_logs_come_back_in_archives_of_a_size(lanes, tmp_path):
    figures = tmp_path / "figures/paper"
    for file in ("kwon2024/05.json", "kwon2024/05.png", "executed/kwon2024/05.ipynb", ".batch/log.txt"):
        (figures / file).parent.mkdir(parents=True, exist_ok=True)
        (figures / file).write_bytes(os.urandom(60_000))
    lanes("start", "--cores", "1")
    lanes("push", "--on", "core", "one", "--", *shows("PATH"))
    lanes("wait", "60")
    made = lanes("collect", str(tmp_path / "out"), str(figures), "--mb", "0.1").split()
    names = []
    for file in made:
        with tarfile.open(file) as archive:
            names += archive.getnames()
    assert len(made) == 2 and len(names) == len(set(names))
    assert sorted(Path(name).name for name in names if "kwon2024" in name) == ["05.json", "05.png"]
    assert any(name.endswith("logs/one.log") for name in names) and not any(".batch" in name for name in names)


def manifest(folder: Path, contents: dict[str, bytes]) -> str:
    tables = [
        f'[files."{name}"]\ndescription = "x"\nlicence = "x"\ncitation = "x"\nsize = {len(content)}\n'
        f'sha256 = "{hashlib.sha256(content).hexdigest()}"\n'
        for name, content in contents.items()
    ]
    (folder / "manifest.toml").write_text("\n".join(tables))
    return str(folder / "manifest.toml")


def test_files_go_in_parts_and_are_whole_once_the_last_has_come(tmp_path):
    contents = {"big/model.bin": os.urandom(2_500_000), "big/config.json": b"{}", "small/rows.csv": b"1,2\n"}
    for name, content in contents.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    told = {"COMPRESSIBLE_MANIFEST": manifest(tmp_path, contents), "COMPRESSIBLE_CACHE": str(tmp_path / "cache")}
    packed = told | {"COMPRESSIBLE_DATA": str(tmp_path / "data"), "COMPRESSIBLE_OFFLINE": "1"}
    call("pack.py", str(tmp_path / "packed"), "--files", "small", "big", "--mb", "1", **packed)
    parts = sorted((tmp_path / "packed").iterdir())
    assert [part.name for part in parts] == ["part00", "part01", "part02"]
    sizes = [sum(file.stat().st_size for file in part.iterdir()) for part in parts]
    assert sizes[:2] == [2**20] * 2 and sum(sizes) == sum(map(len, contents.values()))
    assert (parts[0] / "small%2Frows.csv.0.1").is_file()  # in the order of the call
    said = [call("unpack.py", str(part), **told) for part in reversed(parts)]
    assert "model.bin" in said[-1] and "model.bin" not in said[0]
    for name, content in contents.items():
        assert (tmp_path / "cache/data" / name).read_bytes() == content
    assert not list((tmp_path / "cache/chunks").iterdir())


def test_a_part_that_was_damaged_is_told_and_nothing_is_put_in_place(tmp_path):
    contents = {"a/model.bin": os.urandom(1000)}
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "data/a/model.bin").write_bytes(contents["a/model.bin"])
    told = {"COMPRESSIBLE_MANIFEST": manifest(tmp_path, contents), "COMPRESSIBLE_CACHE": str(tmp_path / "cache")}
    call("pack.py", str(tmp_path / "packed"), "--files", "a", COMPRESSIBLE_DATA=str(tmp_path / "data"), **told)
    (chunk,) = (tmp_path / "packed/part00").iterdir()
    chunk.write_bytes(bytes(1000))
    assert "expected" in call("unpack.py", str(chunk.parent), status=1, **told)
    assert not (tmp_path / "cache/data/a/model.bin").exists()


def test_jobs_are_those_that_the_code_here_did_not_make():
    split = "--split", "yaras2024/table1_glue", "tasks", "step_counts"
    told = {"COMPRESSIBLE_FIGURES": "/nowhere/figures"}
    alone = "--alone", "quick.kwon2024.05_*"
    said = call("jobs.py", "--presets", "quick", "--leave", "quick.beyond.*", *alone, *split, **told)
    lines = [line for line in said.splitlines() if line.startswith("python3 profiles/offline/lanes.py push --on core")]
    assert any(
        "--alone quick.kwon2024.05_completion -- python3 -m compressible run kwon2024/05_completion" in s for s in lines
    )
    parts = [line for line in lines if "--label part-" in line]
    (whole,) = [line for line in lines if "--after" in line]
    assert len(parts) == whole.count("--after") >= 2 and not any("quick.beyond" in line for line in lines)
    for part in parts:  # a part is a run of its own, which the notebook's rules must let pass
        words = shlex.split(part)
        given = {words[at + 1]: words[at + 2] for at, word in enumerate(words) if word == "-p"}
        label = words[words.index("--label") + 1]
        assert len(notebooks.plan("yaras2024/table1_glue", "quick", overrides=given, label=label)["tasks"]) == 1


def test_cells_of_the_sweep_are_packed_as_the_text_says_it(tmp_path):
    program = Path(__file__).parents[1] / "benchmarks/tuning_cells.py"
    command = [sys.executable, str(program), "--preset", "mpnet", "--set", "devices", "one", "--seconds", "0"]
    command += ["--cells", str(tmp_path / "cells"), "--pack", str(tmp_path / "cells.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 cells in ") and (tmp_path / "cells.jsonl").exists()


def chunk_of(tmp_path: Path, content: bytes) -> tuple[Path, dict[str, str]]:
    """A chunk that is all of a file of the manifest, and what unpack.py is told."""
    told = {
        "COMPRESSIBLE_MANIFEST": manifest(tmp_path, {"a/b.bin": content}),
        "COMPRESSIBLE_CACHE": str(tmp_path / "c"),
    }
    (tmp_path / "part00").mkdir()
    chunk = tmp_path / "part00/a%2Fb.bin.0.1"
    chunk.write_bytes(content)
    return chunk, told


def test_what_is_no_part_is_told_in_a_line(tmp_path):
    chunk, told = chunk_of(tmp_path, b"content")
    assert "no folder, expected a part" in call("unpack.py", str(tmp_path / "part01"), status=1, **told)
    for name in ("README", "a%2Fb.bin.x.1", "other.bin.0.1"):
        (chunk.parent / name).touch()
        said = call("unpack.py", str(chunk.parent), status=1, **told)
        assert "is no chunk of a file of the manifest" in said and "Traceback" not in said
        (chunk.parent / name).unlink()
    (chunk.parent / ".DS_Store").touch()
    assert "whole: a/b.bin" in call("unpack.py", str(chunk.parent), **told)


def test_a_damaged_chunk_stops_no_later_call(tmp_path):
    chunk, told = chunk_of(tmp_path, b"content")
    chunk.write_bytes(b"connect")
    assert "bring its parts once more" in call("unpack.py", str(chunk.parent), status=1, **told)
    (tmp_path / "part01").mkdir()
    assert call("unpack.py", str(tmp_path / "part01"), **told) == ""
    chunk.write_bytes(b"content")
    assert "whole: a/b.bin" in call("unpack.py", str(chunk.parent), **told)


def test_archives_of_an_earlier_call_do_not_come_after_newer_ones(lanes, tmp_path):
    (tmp_path / "figures/kwon2024").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / f"figures/kwon2024/{name}.json").write_bytes(os.urandom(60_000))
    out = tmp_path / "out"
    assert len(lanes("collect", str(out), str(tmp_path / "figures"), "--mb", "0.05").split()) == 2
    lanes("collect", str(out), str(tmp_path / "figures"))
    assert [file.name for file in out.iterdir()] == ["collected0.tar.gz"]
    assert "is no folder" in lanes("collect", str(out), str(tmp_path / "figurse"), status=1)


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("pack.py", ["{out}", "--files", "nonsense"], "--files is nonsense, expected how names in the manifest begin"),
        ("pack.py", ["{out}", "--files", "glue-", "--mb", "0"], "--mb is 0, expected a size"),
        ("jobs.py", ["--presets", "papr"], "--presets is papr, expected of "),
        ("jobs.py", ["--presets", "quick", "--split", "kwon2024/05_completion", "tasks"], "expected names of lists"),
        ("jobs.py", ["--presets", "quick", "--split", "kwon2024/5", "tasks"], "expected the id of a notebook"),
    ],
)
def test_what_names_nothing_is_refused_in_a_line(script, arguments, told, tmp_path):
    said = call(script, *(each.format(out=tmp_path / "out") for each in arguments), status=1)
    assert told in said and "Traceback" not in said


def test_a_host_that_holds_other_sources_is_not_taken_for_this_commit(tmp_path):
    """Records would name a commit whose sources are not what ran."""
    (tmp_path / "ready").write_text("aaa\n")
    (tmp_path / "tree").mkdir()
    place = {"OFFLINE": str(tmp_path)}
    for given, told in (("bbb", "holds the sources of commit aaa, expected bbb"), ("", "expected the commit of these")):
        command = ["bash", "-c", f". profiles/offline/host.sh {given}; echo status $? commit $COMPRESSIBLE_COMMIT"]
        done = subprocess.run(command, cwd=OFFLINE.parents[1], env=os.environ | place, capture_output=True, text=True,
                              check=True)  # fmt: skip
        assert told in done.stderr and done.stdout.strip() == "status 2 commit"
