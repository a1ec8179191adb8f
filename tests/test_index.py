"""The page and the last lines of a batch: what was built, what was kept, what failed and where its log lies."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compressible.companion.command_line import main
from compressible.companion.index import entries, summary, write_index


class Page(HTMLParser):
    """Places that a page links to or shows, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.places: list[str] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.places += [value for name, value in attrs if name in ("href", "src") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def add(root: Path, id: str, made: float, **record: object) -> None:
    """A figure of a run as `figures.save` leaves it, made at that time."""
    stem = root / id
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".pdf", ".png", ".npz"):
        stem.with_suffix(suffix).write_bytes(b"picture")
    stem.with_suffix(".json").write_text(json.dumps({"id": id, "preset": "quick", **record}))
    os.utime(stem.with_suffix(".json"), (made, made))


def fail(root: Path, id: str, when: float, told: str) -> None:
    log = root / "failed" / f"{id}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(told)
    os.utime(log, (when, when))


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    """One figure built at 100, one kept from 50, one that failed at 110 with an earlier figure, one without."""
    folder = tmp_path / "quick"
    claim = {"id": "p/01_new.holds", "verdict": "PASS", "reason": ""}
    add(folder, "p/01_new", 100, wall_seconds=2.4, device="Xeon <3>", claims=[claim])
    add(folder, "p/02_kept", 50)
    add(folder, "p/03_failed", 50)
    fail(folder, "p/03_failed", 110, "Traceback\n  here\nValueError: got <b>, expected\n")
    fail(folder, "q/01_never", 120, "")
    fail(folder, "p/01_new", 60, "an older failure\n")
    return tmp_path


def test_page_shows_what_was_built_kept_and_failed(figures: Path) -> None:
    page = Page(write_index(figures, "quick", since=90))
    assert "1 built, 2 failed, 1 of an earlier run" in page.text
    assert "ValueError: got <b>, expected" in page.text
    assert "Xeon <3>" in page.text and "2 s" in page.text
    assert "1 PASS" in page.text and "PASS holds" in page.text and "an older failure" not in page.text
    assert page.text.count("the figure of an earlier run, kept") == 2


def test_every_place_of_the_page_is_there_and_relative(figures: Path) -> None:
    page = write_index(figures, "quick")
    places = Page(page).places
    assert {"p/01_new.png", "p/03_failed.png", "failed/p/03_failed.txt"} <= set(places)
    assert all((page.parent / place).is_file() for place in places)


def test_last_lines_name_what_was_built_where_and_what_failed(figures: Path) -> None:
    ids = ["p/01_new", "p/02_kept", "p/03_failed", "p/04_killed"]
    assert summary(figures, "quick", 90, ids) == [
        "built: p/01_new",
        "as it was, up to date: p/02_kept",
        "not reached: p/04_killed",
        f"failed: p/03_failed: ValueError: got <b>, expected; log: {figures / 'quick/failed/p/03_failed.txt'}",
        f"figures and records: {figures / 'quick'}",
        f"to look at: {figures / 'quick/index.html'}",
    ]


def test_last_lines_call_nothing_up_to_date_that_was_not_finished_or_not_reached(figures: Path) -> None:
    ids = ["p/01_new", "p/02_kept", "p/03_failed", "p/04_killed"]
    told = summary(figures, "quick", 105, ids, unfinished=["p/02_kept", "p/03_failed", "p/04_killed"], reached=False)
    assert told[:4] == [
        "built: nothing",
        "as it was, up to date or not reached: p/01_new",
        "not finished: p/02_kept, p/04_killed",
        f"failed: p/03_failed: ValueError: got <b>, expected; log: {figures / 'quick/failed/p/03_failed.txt'}",
    ]
    told = summary(figures, "quick", 200, ids, unfinished=["p/03_failed"])  # killed: its log is of before
    assert "not finished: p/03_failed" in told and not any(line.startswith("failed") for line in told)


@pytest.mark.parametrize("content", ["", "[1]", '{"claims": null, "wall_seconds": null}', "{"])
def test_a_record_that_is_none_does_not_stop_the_page(content: str, tmp_path: Path) -> None:
    add(tmp_path / "quick", "p/01_new", 100)
    (tmp_path / "quick/p/01_new.json").write_text(content)
    assert "1 built" in Page(write_index(tmp_path, "quick")).text


def test_command_writes_the_page_of_a_real_run(add_notebook, checkout, capsys) -> None:
    assert main(["run", add_notebook("01_good")]) == 0
    assert main(["run", bad := add_notebook("02_bad", "raise ValueError('on purpose')")]) == 1
    capsys.readouterr()
    assert main(["index", "quick"]) == 0
    told = capsys.readouterr().out
    assert "01_good" in told and f"failed: {bad}: ValueError: on purpose; log: " in told
    page = checkout / "figures/quick/index.html"
    assert str(page) in told and all((page.parent / place).is_file() for place in Page(page).places)


def test_command_refuses_a_label_without_figures(checkout, capsys) -> None:
    assert main(["index", "nothing"]) == 2
    assert "no figures under the label 'nothing'" in capsys.readouterr().err


def test_jobs_that_end_meanwhile_do_not_stop_the_page(figures: Path, monkeypatch) -> None:
    before = entries(figures, "quick")
    staging = figures / "quick" / ".staging-of-a-job"
    add(staging, "p/04_half", 100)
    assert entries(figures, "quick") == before
    listed = Path.iterdir

    def gone(folder: Path):  # as if a folder went between the listing of its parent and its own
        if folder.name == "q":
            raise FileNotFoundError(folder)
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", gone)
    assert [entry.id for entry in entries(figures, "quick")] == [e.id for e in before if e.id[0] == "p"]
