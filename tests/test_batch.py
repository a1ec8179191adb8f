"""The batch on small notebooks of its own: values, failures, publication, GPUs, refreshing, snakemake."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY, SAVE, write_notebook

from compressible.companion import batch, freshness, gpu_slots, library, notebooks
from compressible.companion.command_line import main
from compressible.companion.library import notebook_digest
from compressible.companion.parameters import ParameterError
from compressible.companion.reached import reached_sources
from compressible.runtime import paths

ID = "kwon2024/01_good"
SAVE_THEN_FAIL = SAVE.format(id="kwon2024/01_good") + "raise RuntimeError(f'rank {rank} is too much')"
TRANSPORT = "from ipykernel.connect import get_connection_info\nprint(get_connection_info(unpack=True)['transport'])"


def record(label: str = "quick", id: str = ID) -> dict:
    return json.loads(Path("figures", label, f"{id}.json").read_text())


# values


def test_values_come_from_preset_then_files_then_command_line(add_notebook, checkout):
    add_notebook("01_good")
    Path("mine.yaml").write_text("step_size: 2e-2\nrank: 7\n")
    values = notebooks.plan(ID, "paper", ["mine.yaml"], {"rank": "3"}, label="mine")
    assert values == {"rank": 3, "step_size": 0.02, "preset": "mine"}
    assert notebooks.plan(ID, "paper") == {"rank": 5, "step_size": 0.001, "preset": "paper"}


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("1e-3", 0.1, 0.001),
        ("5", 0.1, 5),
        ("true", False, True),
        ("False", True, False),
        ("[1, 2]", [1], [1, 2]),
        ("(3, 4)", [1], (3, 4)),
        ("many", 3, "many"),
        ("5", "auto", "5"),
    ],
)
def test_command_line_values_are_typed(text, default, value):
    parsed = notebooks.parse(text, default)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-p", "stepsize", "5"], "'stepsize'; the closest is 'step_size'"),
        (["-p", "rank", "many"], "rank: got 'many'"),
        (["-p", "rank", "-1"], "rank: got -1"),
        (["-p", "step_size", "nan"], "step_size: got"),
        (["-p", "preset", "mine"], "--label"),
        (["--preset", "papers"], "the closest is 'paper'"),
        (["-f", "absent.yaml"], "absent.yaml"),
        (["-p", "rank", "1" * 400], "rank: got 1111"),
        (["-p", "rank", "1" * 5000], "rank: got '1111"),
        (["-p", "step_size", "1" * 400], "step_size: got 1111"),
        (["-p", "rank", "[" * 3000], "rank: got '[[["),
        (["-p", "rank", "0x" + "f" * 9000], "rank: got an int too large to show"),
        (["-p", "ranks", "[" * 90 + "]" * 90], "ranks[0]: got [[[["),
        (["-p", "rank", "1", "-p", "step_size", "1", "-p", "rank", "2"], "-p rank comes 2 times"),
        (["--kernel", "nope"], "no Jupyter kernel 'nope'; known are"),
        (["--kernel", "nope", "--check"], "no Jupyter kernel 'nope'; known are"),
        (["--label", "a b"], "label: got 'a b', expected text matching"),
        (["--label", "../up"], "label: got '../up', expected text matching"),
        (["--label", "paper"], "label: paper is the name of a preset, whose figure one with the values of quick would"),
    ],
)
def test_wrong_values_are_refused_before_a_kernel_starts(arguments, told, add_notebook, capsys, monkeypatch):
    add_notebook("01_good")
    monkeypatch.setattr(batch, "_execute", lambda *_: pytest.fail("a kernel was started"))
    assert main(["run", ID, *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not Path("figures").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["-p", "rank", "3"], "error: rank is 3, other than in preset paper"),
        (["-f", "own.yaml"], "error: step_size is 0.02, other than in preset paper"),
        (["-p", "rank", "5", "-p", "ranks", "[1]"], "error: ranks is [1], other than in preset paper"),
    ],
)
def test_other_values_than_a_preset_s_need_a_label_of_their_own(given, told, add_notebook, capsys):
    add_notebook("01_good")
    Path("own.yaml").write_text("step_size: 2e-2")
    assert main(["run", ID, "--check", "--preset", "paper", *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{told}, whose figure this would replace") and said.count("\n") == 1
    assert said.endswith("expected a label of your own: --label NAME, or LABEL=NAME for make\n")
    for elsewhere in (["--preset", "paper", "--label", "mine"], ["--preset", "quick"]):
        assert main(["run", ID, "--check", *elsewhere, *given]) == 0


def test_a_preset_s_own_values_may_be_given_again(add_notebook):
    add_notebook("01_good")
    Path("own.yaml").write_text("step_size: 1e-3")
    assert main(["run", ID, "--check", "--preset", "paper", "-p", "rank", "5", "-f", "own.yaml"]) == 0


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"1: 2", "has the key 1; expected the name of a parameter"),
        (b"[1, 2]: 3", "own.yaml"),
        (b"null: 3", "has the key None"),
        (b"rank: \xe9", "UnicodeDecodeError"),
        (b"rank: 1\nrank: 2\n", "rank stands twice"),
        (b"rank: {a: 1, a: 2}", "a stands twice"),
        (b"rank: " + b"[" * 5000, "RecursionError"),
        (b"rank: " + b"1" * 5000, "cannot read own.yaml: ValueError"),
        (b"rank: 0x" + b"f" * 9000, "rank: got '0xfff"),
        (b"rank: 010", "rank: got '010' (str), expected an integer"),  # 8, YAML 1.1 would say
        (b"rank: 1:30", "rank: got '1:30' (str)"),  # 90
        (b"step_size: 1:30.5", "step_size: got '1:30.5' (str)"),
        (b"rank: 2001-99-99", "cannot read own.yaml: ValueError: month must be in 1..12"),
        (b"rank: &a [*a]", "rank: got [[[[[...]]]]] (list)"),
        (b"rank: \x00", "special characters are not allowed"),
        (b"3", "own.yaml holds 3; expected a mapping"),
    ],
)
def test_a_file_of_values_that_is_none_is_refused_in_one_line(content, told, add_notebook, capsys):
    add_notebook("01_good")
    Path("own.yaml").write_bytes(content)
    assert main(["run", ID, "--check", "-f", "own.yaml"]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and len(said) < 600


def test_outside_of_a_checkout_a_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "paths.py"))
    assert main(["list"]) == 2
    assert "no pyproject.toml of 'compressible-dynamics'" in capsys.readouterr().err


def test_unknown_notebook_is_refused_with_the_closest(add_notebook):
    add_notebook("01_good")
    with pytest.raises(notebooks.BatchError, match="the closest is 'kwon2024/01_good'"):
        notebooks.plan("kwon2024/01_goood")


def test_impossible_values_of_defaults_and_overrides_together_are_refused(add_notebook):
    add_notebook("01_good", parameters='preset: str = "quick"\nrank: int = 2\ndimension: int = 10\n')
    with pytest.raises(ParameterError, match=r"rank.*20"):
        notebooks.plan(ID, overrides={"rank": "20"})


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("{minutes: soon}", "minutes: got 'soon', expected a valid number"),
        ("{minutes: 0}", "minutes: got 0, expected greater than 0"),
        ("{minutes: true}", "minutes: got True, expected a valid number"),
        ("{gpu: true}", "missing 'minutes'"),
        ("{minutes: 1, gpus: 2}", "unknown key 'gpus'"),
        ("{minutes: 1, gpu: 2}", "gpu: got 2, expected a valid boolean"),
        ("{minutes: 1, parameters: 2}", "parameters: got 2, expected a valid dictionary"),
        ("{minutes: 1, needs: 2}", "needs: got 2, expected a valid string"),
        ("3", "expected a dictionary"),
    ],
)
def test_malformed_preset_is_refused(entry, told, add_notebook):
    add_notebook("01_good")
    Path("notebooks/kwon2024/presets.yaml").write_text(f"01_good: {{quick: {entry}}}\n")
    with pytest.raises(notebooks.BatchError, match=f"01_good, quick in presets.yaml: {told}"):
        notebooks.presets(ID)


def test_a_failed_run_tells_what_its_preset_needs(add_notebook, capsys):
    add_notebook("01_good", "raise RuntimeError('no such model')")
    entry = "{quick: {minutes: 1}, paper: {minutes: 1, needs: a model from the hub}}"
    Path("notebooks/kwon2024/presets.yaml").write_text(f"01_good: {entry}\n")
    assert main(["run", ID, "--preset", "paper"]) == 1
    assert "s; preset paper needs a model from the hub" in capsys.readouterr().out
    assert main(["run", ID]) == 1 and "needs" not in capsys.readouterr().out


# runs


def test_run_publishes_figure_record_and_executed_notebook(add_notebook, capsys):
    add_notebook("01_good", SAVE.format(id=ID), TRANSPORT)
    assert main(["run", ID, "--check"]) == 0 and freshness.state(ID, "quick") == "missing"
    assert main(["run", ID, "-p", "step_size", "5", "--gpus", "0"]) == 0
    assert record() == {"rank": 2, "step_size": 5.0, "ranks": [1, 2], "gpus": ""}
    executed = nbformat.read("figures/quick/executed/kwon2024/01_good.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "ipc\n"
    assert freshness.state(ID, "quick") == "unknown"  # this notebook writes its record itself, without digests
    assert not list(Path("figures/quick").glob(".staging*"))
    assert main(["run", ID, "--preset", "paper", "--label", "mine"]) == 0
    assert record("mine")["rank"] == 5


def test_the_state_is_told_by_content_not_by_time(add_notebook, capsys):
    add_notebook("01_good")
    assert main(["run", ID]) == 0
    file = Path(f"figures/quick/{ID}.json")
    later = file.stat().st_mtime + 5
    os.utime(f"notebooks/{ID}.ipynb", (later, later))
    known = {"rank": 2, "step_size": 0.1, "ranks": [1, 2]}
    code = {"notebook": notebook_digest(Path(f"notebooks/{ID}.ipynb")), "library": freshness.LIBRARY}
    for record, expected in (
        ({}, "unknown"),
        ({"parameters": known}, "unknown"),
        ({"parameters": known, "notebook": None, "library": None}, "unknown"),
        (code | {"library": None}, "unknown"),
        ({"parameters": known} | code, "done"),
        ({"parameters": known | {"rank": 3}}, "stale"),
        ({"parameters": {"rank": 2}}, "stale"),
        (code | {"notebook": "another"}, "stale"),
        (code | {"library": "another"}, "stale"),
    ):
        file.write_text(json.dumps(record))
        assert freshness.state(ID, "quick") == expected, record
    main(["list"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [ID, "quick", "0.1", "no", "stale"] in lines and [ID, "paper", "2", "no", "missing"] in lines


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[1]", "5", '{"id": 1, "parameters": 5}', '{"id": "a", "preset": "b", "claims": [3]}', "\udcff"),
        '{"id": ["a"], "preset": {}, "claims": []}',
        f'{{"id": "{ID}", "preset": "mine", "claims": []}}',
        f'{{"id": "{ID}", "preset": "mine", "claims": [], "parameters": 3, "metrics": null}}',
        f'{{"id": "{ID}", "preset": "mine", "claims": [], "parameters": {{}}, "metrics": {{}}, "arrays": 3}}',
        f'{{"id": "{ID}", "preset": "mine", "claims": [], "parameters": {{}}, "metrics": {{}}, "not_finite": null}}',
        f'{{"id": "{ID}", "preset": "mine", "claims": [{{"id": "a.b", "verdict": "FAIL", "reason": ["x"]}}]}}',
    ],
)
def test_a_file_that_is_no_record_stops_no_command(content, add_notebook, capsys):
    add_notebook("01_good")
    (file := Path("figures", "mine", f"{ID}.json")).parent.mkdir(parents=True)
    file.write_bytes(content.encode(errors="surrogateescape"))
    Path("data").mkdir()
    Path("data/claims.toml").write_text("")
    for arguments in (["list"], ["claims"], ["index", "mine"], ["times"]):
        assert main(arguments) == 0
    capsys.readouterr()
    assert main(["list", "--check"]) == 1
    assert capsys.readouterr().out.startswith(f"{ID}, mine: ")
    assert main(["redraw", ID, "--preset", "mine"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert freshness.state(ID, "mine") in ("unknown", "done")


@pytest.mark.parametrize("field", ['"wall_seconds": "1"', '"commit": 3', '"device": {}', '"arrays": [{}]'])
def test_a_record_of_odd_seconds_or_commit_is_in_no_table(field, add_notebook, capsys):
    add_notebook("01_good")
    (file := Path("figures", "mine", f"{ID}.json")).parent.mkdir(parents=True)
    file.write_text(f'{{"id": "{ID}", "preset": "mine", "claims": [], {field}}}')
    Path("data").mkdir()
    Path("data/claims.toml").write_text("")
    assert main(["times"]) == 0 and main(["claims"]) == 0
    assert "mine" not in capsys.readouterr().out


def test_the_digest_of_a_notebook_is_of_its_code(add_notebook):
    path = Path(f"notebooks/{add_notebook('01_good', 'x = 1')}.ipynb")
    before, text = notebook_digest(path), path.read_text()
    for old, new, same in (("x = 1", "x = 1  # why", True), ("x = 1", "x = 2", False), ("# true", "# the", True)):
        path.write_text(text.replace(old, new))
        assert (notebook_digest(path) == before) is same
    assert notebook_digest(Path("absent.ipynb")) is None


def test_failure_is_kept_and_earlier_figure_stays_as_it_was(add_notebook, checkout, capsys):
    add_notebook("01_good")
    assert main(["run", ID]) == 0
    shutil.copy(f"notebooks/{ID}.ipynb", "good.ipynb")
    add_notebook("01_good", SAVE_THEN_FAIL)
    assert main(["run", ID, "-p", "rank", "9"]) == 1
    told = Path("figures/quick/failed/kwon2024/01_good.txt").read_text()
    assert "RuntimeError: rank 9 is too much" in told and "\x1b" not in told
    assert Path("figures/quick/failed/kwon2024/01_good.ipynb").exists()
    assert record()["rank"] == 2 and freshness.state(ID, "quick") == "failed"
    shutil.copy("good.ipynb", f"notebooks/{ID}.ipynb")
    assert main(["run", ID]) == 0
    assert not list(Path("figures/quick/failed/kwon2024").iterdir())


@pytest.mark.parametrize(
    ("cell", "told"),
    [("import os; os._exit(1)", "DeadKernelError"), ("rank += 1", "did not save 01_good.pdf")],
)
def test_dead_kernel_and_missing_figure_are_failures(cell, told, add_notebook):
    add_notebook("01_good", cell)
    assert main(["run", ID]) == 1
    assert told in Path("figures/quick/failed/kwon2024/01_good.txt").read_text()
    assert freshness.state(ID, "quick") == "failed" and not Path(f"figures/quick/{ID}.json").exists()


PLACED = """\
import os
from pathlib import Path
import compressible
names = [f"COMPRESSIBLE_{name}" for name in ("DATA", "CACHE", "MANIFEST", "MODELS")]
told = "\\n".join([*(os.environ[name] for name in names), compressible.__file__])
Path(os.environ["COMPRESSIBLE_FIGURES"], "..", "..", "..", "told.txt").resolve().write_text(told)
"""


def test_relative_places_mean_the_same_for_command_line_and_kernel(add_notebook, checkout, monkeypatch, tmp_path):
    add_notebook("01_good", PLACED, SAVE.format(id=ID))
    other = tmp_path / "other" / "compressible"  # another clone, which the kernel would find first
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", "other")
    for name in ("DATA", "CACHE", "MANIFEST", "MODELS"):
        monkeypatch.setenv(f"COMPRESSIBLE_{name}", name.lower())
    monkeypatch.setenv("COMPRESSIBLE_FIGURES", "mine")
    assert main(["run", ID]) == 0
    assert Path(f"mine/quick/{ID}.json").is_file()
    *places, imported = Path("told.txt").read_text().splitlines()
    assert places == [str(checkout / name) for name in ("data", "cache", "manifest", "models")]
    assert Path(imported).parent == library.ROOT


def test_a_record_of_another_library_is_refused(add_notebook, capsys, monkeypatch):
    add_notebook("01_good")
    assert main(["run", ID]) == 0
    of_another = "import json\nstem.with_suffix('.json').write_text(json.dumps({'library': 'f' * 64}))"
    add_notebook("01_good", SAVE.format(id=ID), of_another)
    assert main(["run", ID]) == 1
    told = capsys.readouterr().err
    assert f"computed with library {'f' * 12}, expected {freshness.LIBRARY[:12]}" in told and "Traceback" not in told
    assert record()["rank"] == 2 and freshness.state(ID, "quick") == "failed"
    monkeypatch.setattr(batch, "LIBRARY", "f" * 64)
    assert main(["run", ID]) == 0 and record() == {"library": "f" * 64}


def test_a_failure_is_told_where_nothing_can_be_kept_of_it(add_notebook, capsys, monkeypatch):
    add_notebook("01_good", "raise RuntimeError('as intended')")

    write = paths.write_atomic

    def full(path, content):
        if Path(path).suffix == ".txt":  # by then, that is
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(batch.paths, "write_atomic", full)
    assert main(["run", ID]) == 1
    said = capsys.readouterr()
    assert "as intended" in said.err and "not kept: [Errno 28]" in said.err and "FAILED" in said.out


@pytest.mark.parametrize("command", ["run", "build"])
def test_a_place_that_takes_no_figures_is_said_before_the_work(command, add_notebook, tmp_path, capsys, monkeypatch):
    add_notebook("01_good")
    (tmp_path / "taken").write_text("a file where figures should go")
    monkeypatch.setenv("COMPRESSIBLE_FIGURES", str(tmp_path / "taken"))
    monkeypatch.setattr(batch, "_execute", lambda *_: pytest.fail("a kernel was started"))
    assert main([command, ID]) == 2
    said = capsys.readouterr().err
    assert "figures cannot be written in" in said and "COMPRESSIBLE_FIGURES" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "taken", ["kwon2024", "executed", "kwon2024/01_good.png/x", "executed/kwon2024/01_good.ipynb/x"]
)
def test_a_figure_that_cannot_take_all_its_places_is_refused_before_the_work(taken, add_notebook, capsys, monkeypatch):
    """Else the picture would be of this run and the record of an earlier one."""
    add_notebook("01_good")
    file = Path("figures/quick", taken)
    file.parent.mkdir(parents=True)
    file.write_text("in the way")
    monkeypatch.setattr(batch, "_execute", lambda *_: pytest.fail("a kernel was started"))
    assert main(["run", ID]) == 2
    said = capsys.readouterr().err
    assert "nothing was started" in said and str(Path("figures/quick", taken.removesuffix("/x"))) in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", ID, "--gpus", "-1"], "--gpus is -1, expected an integer from 0"),
        (["run", ID, "--gpus", "1000000000000", "--check"], "--gpus is 1000000000000, expected"),
        (["run", ID, "--check", "--label", "a" * 101], "expected text matching"),
        (["index", ".."], "label: got '..'"),
        (["index", "quick/failed"], "label: got 'quick/failed'"),
    ],
)
def test_what_names_no_folder_and_no_gpu_is_refused_before_anything_starts(arguments, told, add_notebook, capsys):
    add_notebook("01_good")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and not Path("figures").exists()


# GPUs


def test_a_part_of_a_gpu_has_a_name_with_slashes(monkeypatch, tmp_path):
    monkeypatch.setattr(batch.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-1/1/0,MIG-GPU-1/2/0")
    with gpu_slots.gpu_slot(2) as first, gpu_slots.gpu_slot(2):
        assert first == "MIG-GPU-1/1/0"


def test_no_gpu_hides_them_and_the_environment_comes_back(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with gpu_slots.gpu_slot(0):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    with gpu_slots.gpu_slot(2) as device:
        assert device == os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_two_jobs_get_two_gpus_and_a_third_waits(monkeypatch, tmp_path):
    monkeypatch.setattr(batch.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,9")
    third = threading.Thread(target=lambda: order.append(gpu_slots.first_free(["4", "7"])[0]))
    order: list[str] = []
    first, held = gpu_slots.first_free(["4", "7"])
    with gpu_slots.gpu_slot(2) as second:
        assert (first, second) == ("4", "7")
        third.start()
        third.join(0.2)
        assert order == []
        held.release()
        third.join(10)
    assert order == ["4"]


def test_no_gpu_is_waited_for_that_the_machine_does_not_have(monkeypatch, tmp_path):
    monkeypatch.setattr(batch.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(gpu_slots, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    with gpu_slots.gpu_slot(64) as device:  # a container of one GPU, whatever its number on the host
        assert device == os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_two_batches_with_one_gpu_take_turns(monkeypatch, tmp_path):
    monkeypatch.setattr(batch.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    lock = gpu_slots.first_free(["0"])[1]  # held by a job of the other batch
    shown: list[str] = []

    def job() -> None:
        with gpu_slots.gpu_slot(1) as device:
            shown.append(device)

    waiting = threading.Thread(target=job)
    waiting.start()
    waiting.join(0.5)
    assert shown == []
    lock.release()
    waiting.join(10)
    assert shown == ["0"]


# refreshing


def test_refresh_is_stable_and_keeps_only_what_matters(add_notebook):
    add_notebook("01_good", SAVE.format(id=ID), "print(rank)")
    path = Path(f"notebooks/{ID}.ipynb")
    assert main(["notebooks"]) == 0
    once = path.read_bytes()
    notebook = nbformat.reads(once.decode(), as_version=4)
    assert notebook.cells[-1].outputs[0].text == "2\n" and notebook.cells[-1].metadata == {}
    assert notebook.cells[0].metadata == {"tags": ["parameters"]}
    assert main(["notebooks", ID]) == 0
    assert path.read_bytes() == once and not Path("figures").exists()


def test_refresh_that_fails_leaves_the_file(add_notebook, capsys):
    add_notebook("01_good", "1 / 0")
    before = Path(f"notebooks/{ID}.ipynb").read_bytes()
    assert main(["notebooks"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert Path(f"notebooks/{ID}.ipynb").read_bytes() == before


# snakemake


def snakemake(*config: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    options = ["--cores", "3", "--keep-going", "--scheduler", "greedy", "--resources", "gpu=0", *options]
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *options, "--config", "gpus=0", *config],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip


def watched(*config: str) -> set[str]:
    """The library's files that snakemake notes as inputs of what it made."""
    table = snakemake(*config, options=["--detailed-summary"]).stdout
    return set(re.findall(r"lib/compressible/[\w/]+\.py", table))


def sources(checkout: Path) -> list[Path]:
    """The files of which the library's digest is made; never none."""
    found = library.computing_sources(checkout / "lib" / "compressible")
    assert len(found) > 50
    return found


def test_snakemake_goes_on_after_a_failure_and_repeats_only_that(add_notebook, checkout):
    shutil.copy(REPOSITORY / "Snakefile", checkout)
    bad = add_notebook("00_bad", "raise RuntimeError('as intended')")
    good = add_notebook("01_good")
    result = snakemake("args=-p step_size 5")
    assert result.returncode != 0 and record(id=good)["step_size"] == 5
    assert "as intended" in Path(f"figures/quick/failed/{bad}.txt").read_text()
    made = Path(f"figures/quick/{good}.json").stat().st_mtime_ns
    write_notebook(checkout / "notebooks" / f"{bad}.ipynb", SAVE.format(id=bad))
    assert snakemake("args=-p step_size 5").returncode == 0 and record(id=bad)["step_size"] == 5
    assert Path(f"figures/quick/{good}.json").stat().st_mtime_ns == made
    assert not Path(f"figures/quick/failed/{bad}.txt").exists()


def test_snakemake_builds_what_has_the_preset_and_refuses_a_preset_that_nothing_has(add_notebook, checkout):
    shutil.copy(REPOSITORY / "Snakefile", checkout)
    save = SAVE.format(id="kwon2024/01_small")
    small, _ = add_notebook("01_small", "from compressible.recovery import spectra", save), add_notebook("02_other")
    presets = Path("notebooks/kwon2024/presets.yaml")
    presets.write_text(presets.read_text().replace("01_small:", "01_small:\n  minilm: {minutes: 1}"))
    assert snakemake("preset=minilm").returncode == 0
    assert [file.stem for file in Path("figures/minilm/kwon2024").glob("*.json")] == [Path(small).name]
    reached = reached_sources(checkout / "notebooks" / f"{small}.ipynb", checkout / "lib" / "compressible")
    assert watched("preset=minilm") == {file.relative_to(checkout).as_posix() for file in reached}
    assert set(reached) < set(sources(checkout))
    result = snakemake("preset=minlm")
    assert result.returncode != 0 and "no notebook has a preset 'minlm'" in result.stderr + result.stdout


def test_snakemake_leaves_a_published_figure_where_a_run_fails_or_is_refused(add_notebook, checkout):
    shutil.copy(REPOSITORY / "Snakefile", checkout)
    id = add_notebook("01_good")
    published = [Path(f"figures/quick/{id}{suffix}") for suffix in (".pdf", ".png", ".json")]
    assert snakemake().returncode == 0
    before = [file.read_bytes() for file in published]
    for arguments in (["args=-p step_size high"], ["label=quick/"], ["args=-p no_such 1"]):
        assert snakemake(*arguments).returncode != 0
        assert [file.read_bytes() for file in published] == before
    write_notebook(checkout / "notebooks" / f"{id}.ipynb", "raise RuntimeError('as intended')")
    assert snakemake().returncode != 0
    assert [file.read_bytes() for file in published] == before
    assert "as intended" in Path(f"figures/quick/failed/{id}.txt").read_text()


def test_snakemake_makes_a_figure_again_whose_code_came_with_an_older_time(add_notebook, checkout):
    """As by a copy that keeps times, or where a clock goes back."""
    shutil.copy(REPOSITORY / "Snakefile", checkout)
    id = add_notebook("01_good")
    assert snakemake().returncode == 0
    notebook = checkout / "notebooks" / f"{id}.ipynb"
    before = notebook.stat().st_mtime - 1000
    write_notebook(notebook, SAVE.format(id=id).replace("rank=rank", "rank=7"))
    os.utime(notebook, (before, before))
    assert snakemake().returncode == 0
    assert json.loads(Path(f"figures/quick/{id}.json").read_text())["rank"] == 7


def test_snakemake_makes_a_figure_again_that_is_gone(add_notebook, checkout):
    shutil.copy(REPOSITORY / "Snakefile", checkout)
    id = add_notebook("01_good")
    assert snakemake().returncode == 0
    for suffix in (".json", ".png"):
        Path(f"figures/quick/{id}{suffix}").unlink()
        assert snakemake().returncode == 0
        assert Path(f"figures/quick/{id}{suffix}").is_file()


def test_snakemake_goes_on_after_a_kill(add_notebook, checkout):
    shutil.copy(REPOSITORY / "Snakefile", checkout)
    id = add_notebook("00_slow", "import time; time.sleep(60)")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--nolock",
        "--cores",
        "1",
        "--resources",
        "gpu=0",
        "--config",
        "gpus=0",
    ]
    batch_ = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(checkout.glob("figures/quick/.staging-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(batch_.pid, signal.SIGKILL)
    batch_.wait()
    write_notebook(checkout / "notebooks" / f"{id}.ipynb", SAVE.format(id=id))
    assert snakemake(options=["--nolock", "--rerun-incomplete"]).returncode == 0
    assert Path(f"figures/quick/{id}.json").is_file()


@pytest.mark.parametrize("whole", [True, False], ids=["terminal", "alone"])
def test_ctrl_c_stops_a_run_with_a_word_and_leaves_nothing(whole, add_notebook, checkout):
    id = add_notebook("00_slow", "import time; time.sleep(300)")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has set it aside
    run = subprocess.Popen([sys.executable, "-m", "compressible", "run", id], start_new_session=True, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while not list(checkout.glob("figures/quick/.staging-*/notebook.ipynb")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    (os.killpg if whole else os.kill)(run.pid, signal.SIGINT)
    told, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and told.endswith("stopped\n") and "Traceback" not in told, told
    assert not list(checkout.glob("figures/quick/.staging-*"))


def interrupted_after(mark, id):
    """Exit status and errors of a run that gets Ctrl-C when the module `mark` has been imported."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has set it aside
    command = [sys.executable, "-X", "importtime", "-m", "compressible", "run", id]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    for line in run.stderr:
        if line.rpartition("|")[2].strip() == mark:
            run.send_signal(signal.SIGINT)
            break
    told = [line for line in run.communicate(timeout=60)[1].splitlines() if not line.startswith("import time:")]
    return run.returncode, told


@pytest.mark.parametrize(
    "mark",
    [
        "argparse",
        "compressible.companion.staging",
        "yaml",
        "pydantic",
        "compressible.companion.command_line",
        "papermill",
    ],
)
def test_ctrl_c_while_a_command_is_imported_stops_it_with_a_word(mark, add_notebook):
    assert interrupted_after(mark, add_notebook("00_slow", "import time; time.sleep(300)")) == (130, ["stopped"])


@pytest.mark.parametrize("quoted", ["-p ranks '[2, 3]'", '-p ranks "[2, 3]"'])
def test_quotes_of_arguments_reach_the_job_as_they_were_checked(quoted, add_notebook, checkout, monkeypatch):
    shutil.copy(REPOSITORY / "Snakefile", checkout)
    id = add_notebook("01_good")
    monkeypatch.setenv("COMPRESSIBLE_ARGS", quoted)
    assert snakemake().returncode == 0
    assert record(id=id)["ranks"] == [2, 3]


def test_snakemake_refuses_an_id_it_does_not_know(add_notebook, checkout):
    shutil.copy(REPOSITORY / "Snakefile", checkout)
    add_notebook("01_good")
    result = snakemake("ids=kwon2024/99_absent")
    assert result.returncode != 0 and "kwon2024/99_absent" in result.stderr + result.stdout
