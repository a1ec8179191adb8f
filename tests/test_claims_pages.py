"""What is written from the records: CLAIMS.md, GALLERY.md, the README's table and the notebooks' first cells."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pytest
from test_claims import ENTRY, FIGURE

from compressible.companion import claims, records
from compressible.companion.claims import Claim, ClaimError, Standing, pages, status, wording, writing
from compressible.companion.command_line import main
from compressible.companion.library import notebook_digest

OTHER = "yaras2024/03_svd_evolution"
GOOD, WIDE, BAD = np.array([0.5, 0.51, 0.49]), np.array([0.1, 0.9, 1.8]), np.array([2.0, 2.1, 1.9])
ITEM = f'[[item]]\npaper = "P2"\nname = "deep completion"\nnotebooks = ["{FIGURE}"]\nclaims = ["{FIGURE}.*"]\n'


def claim(name: str = "x", figure: str = FIGURE, paper: Any = "P2", **more: Any) -> Claim:
    known: dict[str, Any] = {"bound": 1.0, "unit": "seed", "group": "published", "bound_from": "a margin"} | more
    return Claim(f"{figure}.{name}", paper, known.pop("statement", "a statement"), "m", "at_most", "a source", **known)


def stand(tested: Claim, values: Any, preset: str = "paper") -> Standing:
    """A claim judged on a record of these values; None for no record."""
    if values is None:
        return Standing(tested, None, None, "no record")
    found = claims.verdict(tested, SimpleNamespace(arrays={"m": np.asarray(values)}, metrics={}, parameters={}))
    record = {"id": tested.figure, "preset": preset, "device": "NVIDIA H200", "commit": "0123456789", "claims": []}
    return Standing(tested, vars(found), record, found.reason)


def write_record(root: Path, tested: Claim, values: np.ndarray, preset: str = "paper") -> None:
    found = claims.verdict(tested, SimpleNamespace(arrays={"m": values}, metrics={}, parameters={}))
    record = {"id": tested.figure, "preset": preset, "device": "NVIDIA H100 80GB HBM3", "commit": "abcdef1234"}
    record |= {"wall_seconds": 12.4, "parameters": {}, "metrics": {"m": values.tolist()}, "claims": [asdict(found)]}
    path = root / "figures" / preset / f"{tested.figure}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


# the page of claims


@pytest.mark.parametrize(
    ("field", "value"), [("metrics", {"m": [[1], 1.0]}), ("metrics", {"m": [10**400]}), ("parameters", {"rank": {}})]
)
def test_a_record_that_cannot_be_judged_is_named(field: str, value: Any, tmp_path: Path) -> None:
    tested = claim(requires={"rank": 1})
    write_record(tmp_path, tested, GOOD)
    path = tmp_path / "figures" / "paper" / f"{FIGURE}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parameters": {"rank": 2}} | {field: value}))
    with pytest.raises(ClaimError, match=f"{re.escape(str(path))}.*expected numbers"):
        claims.standings(tmp_path / "figures", claims=[tested])


def test_groups_are_counted_apart() -> None:
    standing = [stand(claim(), GOOD), stand(claim("y"), BAD), stand(claim("z", group="own", paper="beyond"), WIDE)]
    text = pages.claims_page(standing, [])
    assert "(#published-claims-on-the-published-setting) | 2 | 1 | 0 | 1 | 0 | 0 |" in text
    assert "[Our own findings](#our-own-findings) | 1 | 0 | 0 | 0 | 1 | 0 |" in text
    assert "Engineering goals" not in text.replace(pages.LEGEND, "")
    assert text.index("## Published") < text.index(f"{FIGURE}.y") < text.index("## Our own") < text.index(f"{FIGURE}.z")


def test_within_a_group_claims_stand_by_paper_and_figure() -> None:
    standing = [stand(claim(), GOOD), stand(claim("a", OTHER, "P1"), GOOD), stand(claim("z"), GOOD)]
    text = pages.claims_page(standing, [])
    heads = [line for line in text.splitlines() if line.startswith("### ")]
    assert heads == [f"### P1: {OTHER}", f"### P2: {FIGURE}"]
    assert text.index(f"{FIGURE}.x") < text.index(f"{FIGURE}.z")


def test_a_row_says_what_a_referee_asks() -> None:
    tested = claim(published="0.6", published_range=[0.5, 0.7], bound_from="twice the published", after_looking=True)
    item = status.Item("P2", "deep completion", claims=[f"{FIGURE}.*"])
    row = next(line for line in pages.claims_page([stand(tested, GOOD)], [item]).splitlines() if "a statement" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == f'<a id="{FIGURE}.x"></a>`{FIGURE}.x` †<br>a statement'
    assert cells[1:4] == ["P2 deep completion; a source", "0.6 [0.5, 0.7]", "<= 1; twice the published"]
    assert cells[4:] == ["0.5 [0.475, 0.525]", "3 seeds", "H200, paper, 0123456", "**PASS**"]
    assert len(cells) == len(pages.HEADS)


def test_a_row_without_record_says_why() -> None:
    (row,) = [line for line in pages.claims_page([stand(claim(), None)], []).splitlines() if "a statement" in line]
    assert row.endswith("|  |  |  | **NOT TESTED**: no record |")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("|a| < b", "\\|a\\| < b"),
        ("a\n  b", "a b"),
        ("<b> and <= 3", "&lt;b> and <= 3"),
        ("in $|x| + \\|y\\|_F$", "in $\\vert x\\vert  + \\Vert y\\Vert _F$"),
        ("`a|b` ~3", "`a\\|b` \\~3"),
        ("|X|_*^2, |Y|_F of X* and a_b", "\\|X\\|\\_\\*^2, \\|Y\\|\\_F of X\\* and a_b"),
    ],
)
def test_a_cell_keeps_formulas_and_breaks_no_table(text: str, expected: str) -> None:
    assert wording.cell(text) == expected


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.5, 0.4, 0.6, "0.5 [0.4, 0.6]"),
        (0.99999996, 0.99999995, 0.99999997, "0.99999996 [0.99999995, 0.99999997]"),
        (1.0, 1.0, 1.0, "1 [1, 1]"),
        (136444.2, 136403.0, 136484.0, "136444 [136403, 136484]"),
        (5.198e6, 5.19e6, 5.2e6, "5.198e+06 [5.19e+06, 5.2e+06]"),
        (1.5, None, None, "1.5"),
    ],
)
def test_an_interval_has_as_many_digits_as_tell_its_parts_apart(
    value: float, low: float | None, high: float | None, expected: str
) -> None:
    judged = {"verdict": claims.PASS, "value": value, "low": low, "high": high, "seeds": 3}
    assert wording.ours(Standing(claim(), judged, None, "")) == expected


def test_values_that_diverged_have_words_of_their_own() -> None:
    assert wording.ours(stand(claim(), [0.5, np.nan, 0.5])) == "not finite"


# the status of an item


def words(*standing: Standing, **more: Any) -> str:
    return status.status(status.Item("P2", "deep completion", claims=[f"{FIGURE}.*"], **more), standing)


def test_the_status_follows_from_the_verdicts() -> None:
    good, wide, bad = (stand(claim(name), values) for name, values in zip("abc", (GOOD, WIDE, BAD), strict=True))
    assert words(good) == "reproduced, 1 of 1"
    assert words(good, bad, wide) == "partly, 1 of 3"
    assert words(stand(claim("w", weak=3.0), BAD)) == "partly, 0 of 1"
    assert words(bad, wide) == "not reproduced, 0 of 2"
    assert words(wide) == "not known, 0 of 1"
    assert words(good, stand(claim("u"), None)) == "partly, 1 of 2, 1 not tested"
    assert words(wide, stand(claim("u"), None)) == "not known, 0 of 2, 1 not tested"
    assert words(stand(claim(), None)) == words() == "not run"
    assert words(stand(claim(), None), notebooks=[FIGURE]) == "not tested"
    assert words(good, unknown=True) == "contents unknown"
    assert words(good, note="ours") == "reproduced, 1 of 1; ours"


def test_transferred_claims_speak_where_no_published_one_was_judged() -> None:
    moved = stand(claim("m", group="transferred"), BAD)
    assert words(moved, stand(claim(), None), moved_to="MiniLM") == "not reproduced, 0 of 1, transferred to MiniLM"
    assert words(moved, stand(claim(), GOOD), moved_to="MiniLM") == "reproduced, 1 of 1"
    assert words(stand(claim(group="own"), GOOD), stand(claim("y", OTHER), GOOD)) == "not run"


def test_mistakes_in_the_file_of_items_are_named(tmp_path: Path) -> None:
    path = tmp_path / "status.toml"
    path.write_text(ITEM + 'shown = "x"\n')
    with pytest.raises(ClaimError, match=r"deep completion: .*'shown'"):
        status.load_items(path)
    path.write_text("[[item")
    with pytest.raises(ClaimError, match=r"status\.toml: "):
        status.load_items(path)


# which record is judged


def test_a_metric_of_many_values_is_read_from_the_arrays_beside_the_record(tmp_path: Path) -> None:
    write_record(tmp_path, claim(), GOOD)
    path, values = tmp_path / "figures" / "paper" / f"{FIGURE}.json", np.full(100, 0.5)
    content, told = records.pack({"m": values})
    record = json.loads(path.read_text()) | {"metrics": {}, "claims": [], "arrays": told}
    path.write_text(json.dumps(record))
    path.with_suffix(".npz").write_bytes(content)
    (found,) = claims.standings(tmp_path / "figures", claims.OWN, [claim()])
    assert found.verdict == claims.PASS and found.judged and found.judged["seeds"] == 100
    path.with_suffix(".npz").write_bytes(b"altered")
    (found,) = claims.standings(tmp_path / "figures", claims.OWN, [claim()])
    assert (found.verdict, found.record) == (claims.NOT_TESTED, None)


def test_claims_of_one_question_are_judged_together(tmp_path: Path) -> None:
    values = np.array([0.2, 0.9, 0.3, 0.7, 0.6, 0.1])
    alone, both = claim(bound=0.86), [claim(name, bound=0.86, question="which") for name in "xy"]
    write_record(tmp_path, alone, values)
    (first,) = claims.standings(tmp_path / "figures", claims.OWN, [alone])
    assert first.verdict == claims.PASS
    for found in claims.standings(tmp_path / "figures", claims.OWN, both):
        assert (found.verdict, found.reason) == (claims.INCONCLUSIVE, "not after Holm's correction over 2 claims")


# where it is written


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one claim, its notebook and a README, as the working directory."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "compressible-dynamics"\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "claims.toml").write_text(ENTRY)
    (tmp_path / "data" / "status.toml").write_text(f'{ITEM}[questions]\n"{FIGURE}" = "Ever behind?"\n')
    (tmp_path / "README.md").write_text("above\n<!-- status:start -->\nold\n<!-- status:end -->\nbelow\n")
    path = tmp_path / "notebooks" / f"{FIGURE}.ipynb"
    path.parent.mkdir(parents=True)
    write_notebook(path, "# Never behind\n\n**Claim.** It is $<$ the other.")
    path.with_name("presets.yaml").write_text(f"{path.stem}: {{quick: {{minutes: 1}}}}\n")
    monkeypatch.delenv("COMPRESSIBLE_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_notebook(path: Path, first: str) -> None:
    cells = [nbformat.v4.new_markdown_cell(first, id="a"), nbformat.v4.new_code_cell("x = 1  # é", id="b")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def first_cell(path: Path) -> str:
    return nbformat.read(path, as_version=4).cells[0].source


def test_everything_is_written_and_only_once(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(project, claim(), GOOD)
    assert main(["claims", "--write"]) == 0
    shown = capsys.readouterr().out.split()[1::2]
    assert shown == ["CLAIMS.md", "GALLERY.md", "README.md", f"notebooks/{FIGURE}.ipynb"]
    readme = (project / "README.md").read_text()
    assert readme.startswith("above\n<!-- status:start -->\n|  | claims | PASS |") and readme.endswith("-->\nbelow\n")
    assert "| Published claims on the published setting | 1 | 1 | 0 |" in readme
    assert f"| P2 deep completion | [kwon2024/05](notebooks/{FIGURE}.ipynb) | reproduced, 1 of 1 |" in readme
    assert "0.5 [0.475, 0.525] | 3 seeds | H100, paper, abcdef1 | **PASS**" in (project / "CLAIMS.md").read_text()
    assert main(["claims", "--write"]) == 0 and capsys.readouterr().out == ""


def test_a_notebook_in_which_somebody_tries_something_out_is_left_alone(project: Path) -> None:
    claims.write()
    before, own = (project / "GALLERY.md").read_text(), project / "notebooks" / "kwon2024" / "Untitled.ipynb"
    for text in ('{"cells": []}', '{"cells": [{"cell_type": "markdown", "metadata": {}, "source": "mine"}]}'):
        own.write_text(text)
        assert claims.write() == [] and own.read_text() == text
    assert (project / "GALLERY.md").read_text() == before and writing.title(own) == "mine"
    own.write_text('{"cells": []}')
    assert writing.title(own) == "Untitled"


def test_the_gallery_has_question_answer_picture_and_links(project: Path) -> None:
    write_record(project, claim(), GOOD)
    claims.write()
    text = (project / "GALLERY.md").read_text()
    assert (
        f'<a id="{FIGURE}"></a>\n\n## Ever behind?\n\nNever behind.\n\n![Ever behind?](figures/paper/{FIGURE}.png)'
        in text
    )
    assert (
        f"1 PASS (`{FIGURE}`, preset paper, H100, commit abcdef1, 12 s); [notebook](notebooks/{FIGURE}.ipynb)" in text
    )


def test_a_figure_without_record_says_how_to_run_it(project: Path) -> None:
    claims.write()
    assert "1 NOT TESTED." in (project / "GALLERY.md").read_text()
    assert f"`make figure ID={FIGURE} PRESET=paper` does" in first_cell(project / "notebooks" / f"{FIGURE}.ipynb")


def test_a_notebook_shows_its_record_first_and_keeps_everything_else(project: Path) -> None:
    path = project / "notebooks" / f"{FIGURE}.ipynb"
    before, digest = nbformat.read(path, as_version=4), notebook_digest(path)
    write_record(project, claim(published="0.7"), GOOD)
    claims.write()
    after, source = nbformat.read(path, as_version=4), first_cell(path)
    assert source.startswith(before.cells[0].source + f"\n\n{writing.START}\n") and source.endswith(writing.END)
    assert f"![The figure at full scale](../../figures/paper/{FIGURE}.png)" in source
    assert "| a statement |  | 0.5 [0.475, 0.525], 3 seeds | **PASS** |" in source
    assert after.cells[1] == before.cells[1] and notebook_digest(path) == digest
    assert path.read_text() == json.dumps(json.loads(path.read_text()), indent=1, ensure_ascii=False) + "\n"


def test_the_region_takes_the_place_of_the_sentence_that_stood_there(project: Path) -> None:
    path = project / "notebooks" / f"{FIGURE}.ipynb"
    old = "The committed figure at that scale; its verdicts are in the [table of claims](../../README.md):"
    write_notebook(path, f"# Title\n\nClaim.\n\n{old}\n\n![The figure at the paper's scale](../../figures/paper/x.png)")
    text = writing.with_region(path, "new")
    assert json.loads(text)["cells"][0]["source"] == [
        "# Title\n", "\n", "Claim.\n", "\n", f"{writing.START}\n", "new\n", writing.END,
    ]  # fmt: skip
    path.write_text(text)
    assert "".join(json.loads(writing.with_region(path, "newer"))["cells"][0]["source"]).count("newer") == 1


def test_a_file_without_marks_or_of_another_form_is_refused(project: Path) -> None:
    (project / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match=r"README\.md: expected the marks <!-- status:start -->"):
        claims.write()
    path = project / "notebooks" / f"{FIGURE}.ipynb"
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(ValueError, match="expected JSON as Jupyter writes it"):
        writing.with_region(path, "new")


def test_the_command_prints(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(project, claim(), GOOD, "quick")
    assert main(["claims"]) == 0
    assert "PASS         a statement" in capsys.readouterr().out
    assert main(["claims", "--preset", "paper", "--format", "markdown"]) == 0
    assert "**NOT TESTED**: no record: `make figure" in capsys.readouterr().out
    assert main(["claims", "--preset", "papr"]) == 2
    assert "got 'papr', expected 'own' or a preset; the closest is 'paper'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="format: got 'html'"):
        claims.table(format="html", claims=[])
