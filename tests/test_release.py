"""A release: whole or not at all, with checksums that hold; how it is cited; what changed since the last one."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import PYPROJECT, REPOSITORY
from test_claims_pages import BAD, GOOD, claim, stand

from compressible import __version__
from compressible.companion import release
from compressible.companion.claims import changes
from compressible.companion.command_line import main
from compressible.runtime import paths

PARTS = [f"compressible-dynamics-{part}-{__version__}.tar.gz" for part in ("records", "site")]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one commit, with packages and a site that are made in no time."""
    root = tmp_path / "checkout"
    (root / "figures" / "paper" / "kwon2024").mkdir(parents=True)
    (root / "figures" / "paper" / "kwon2024" / "05_completion.json").write_text("{}")
    (root / "pyproject.toml").write_text(PYPROJECT)
    for name in release.WITH_RECORDS[1:]:
        (root / name).mkdir() if name in ("data", "notebooks") else (root / name).write_text(name)
    for name in ("data/claims.toml", "notebooks/one.ipynb", "constraints.txt"):
        (root / name).write_text(name)
    for name in ("CITATION.cff", ".zenodo.json"):
        (root / name).write_bytes((REPOSITORY / name).read_bytes())
    (root / ".gitignore").write_text("/dist/\n")
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    monkeypatch.chdir(root)
    monkeypatch.setattr(release, "_packages", lambda tree, made: (made / "a.whl").write_bytes(b"wheel") and None)

    def site(out: Path) -> Path:
        (out / "html").mkdir(parents=True)
        (out / "html" / "index.html").write_text("front page")
        return out / "html" / "index.html"

    monkeypatch.setattr(release, "site", SimpleNamespace(build=site))
    return root


def test_a_release_is_whole_and_its_checksums_hold(tree, capsys):
    (tree / "dist").mkdir()
    assert main(["release", "--draft"]) == 0
    folder = tree / "dist" / __version__
    assert {file.name for file in folder.iterdir()} == {*PARTS, "a.whl", "CITATION.cff", ".zenodo.json", release.SUMS}
    checked = subprocess.run(["sha256sum", "-c", release.SUMS], cwd=folder, capture_output=True, text=True, check=True)
    assert checked.stdout.count(": OK") == 5
    with tarfile.open(folder / PARTS[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"figures/paper/kwon2024/05_completion.json", "data/claims.toml", "constraints.txt", "CITATION.cff"} <= names
    cited = yaml.safe_load((folder / "CITATION.cff").read_text())
    assert cited["version"] == __version__ and re.fullmatch("[0-9a-f]{40}", cited["commit"])
    assert "made in" in capsys.readouterr().out and list((tree / "dist").iterdir()) == [folder]


@pytest.mark.parametrize("part", ["_packages", "_records", "_cite", "sums"])
def test_a_release_that_fails_leaves_nothing(part, tree, monkeypatch, capsys):
    def fail(*_: Any) -> None:
        raise release.ReleaseError(f"{part} as intended")

    monkeypatch.setattr(release, part, fail)
    assert main(["release", "--draft"]) == 2 and f"{part} as intended" in capsys.readouterr().err
    assert list((tree / "dist").iterdir()) == []


def test_what_is_not_committed_or_there_already_is_refused(tree, capsys):
    (tree / "new.py").write_text("")
    assert main(["release", "--draft"]) == 2
    assert "1 files are not committed, ?? new.py for one" in capsys.readouterr().err and not (tree / "dist").exists()
    (tree / "new.py").unlink()
    (tree / "dist" / __version__).mkdir(parents=True)
    assert main(["release", "--draft"]) == 2 and "is there already, expected none" in capsys.readouterr().err


def test_records_that_do_not_fit_are_no_release(tree, monkeypatch, capsys):
    from compressible.companion import publishing

    monkeypatch.setattr(publishing, "check_records", lambda: 1)
    assert main(["release"]) == 2 and "--draft makes one all the same" in capsys.readouterr().err


def test_a_release_is_judged_by_the_records_that_it_is_made_of(tree, monkeypatch, capsys):
    from compressible.companion import publishing

    asked = []
    monkeypatch.setattr(publishing, "check_records", lambda: asked.append(paths.figures_dir()) or 1)
    monkeypatch.setenv("COMPRESSIBLE_FIGURES", str(tree / "elsewhere"))
    assert main(["release"]) == 2 and asked == [paths.repository() / "figures"]


# citation


def test_the_citation_file_has_the_structure_of_cff_1_2():
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software" and cited["message"] and cited["title"]
    known = {"cff-version", "message", "title", "type", "license", "abstract", "keywords", "authors", "references"}
    assert cited.keys() <= known and "version" not in cited  # of which the package alone tells, and the release
    persons = [author for of in cited["references"] for author in of["authors"]]
    assert all(set(person) == {"family-names", "given-names"} for person in persons)
    assert [set(author) for author in cited["authors"]] == [{"name"}]
    for of in cited["references"]:
        assert {"type", "title", "authors", "year", "url", "identifiers"} <= of.keys()
        assert isinstance(of["year"], int) and of["type"] in ("conference-paper", "article")
        assert all(set(each) == {"type", "value"} and each["type"] == "other" for each in of["identifiers"])


def test_all_citations_name_the_same_papers():
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    bib = (REPOSITORY / "CITATION.bib").read_text().replace("\\&", "&")
    deposit = json.loads((REPOSITORY / ".zenodo.json").read_text())
    assert [of["title"] for of in cited["references"]] == re.findall(r"^  title\s+= \{(.+)\},$", bib, re.M)
    people = [
        " and ".join(f"{a['family-names']}, {a['given-names']}" for a in of["authors"]) for of in cited["references"]
    ]
    assert people == re.findall(r"author\s+= \{(.+)\},$", bib, re.M)
    ours = [of["identifiers"][0]["value"] for of in cited["references"]]
    assert ours == [of["identifier"] for of in deposit["related_identifiers"]]
    assert (deposit["license"], deposit["upload_type"]) == (cited["license"], cited["type"])


# what changed


def record_of(values: Any, **more: Any) -> Any:
    standing = stand(claim(), values)
    if standing.record is not None:
        standing.record.update({"run": "1", "commit": "a" * 40, "versions": {"torch": "2.11.0"}} | more)
    return standing


def test_verdicts_that_changed_are_told_with_the_reason():
    now = record_of(BAD, run="2", commit="b" * 40, library="x", versions={"torch": "2.13.0"})
    text = changes.changes([record_of(GOOD)], [now])
    figure = claim().figure
    assert text.splitlines()[0] == f"- {figure}:"
    assert "  - `x`, PASS to FAIL: 0.5 [" in text and "] to 2 [" in text
    assert "made anew at bbbbbbb (other code, PyTorch 2.11.0 to 2.13.0)." in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= changes.WIDTH


def test_a_claim_s_own_change_new_claims_and_lost_ones_are_told():
    figure = claim().figure
    other = stand(claim(bound=5.0), BAD)
    assert (
        "FAIL to PASS" in (text := changes.changes([stand(claim(), BAD)], [other])) and "the claim is another" in text
    )
    assert "`y` is new: PASS" in changes.changes([], [stand(claim("y"), GOOD)])
    assert changes.changes([stand(claim("z"), GOOD)], []) == f"- Claims that are no more: `{figure}.z`.\n"
    assert "NOT TESTED to PASS" in changes.changes([record_of(None)], [record_of(GOOD)])
    assert changes.changes([record_of(GOOD)], [record_of(GOOD, run="2")]) == "no verdict changed\n"


def test_what_is_given_beside_or_of_a_variable_that_is_not_set_is_not_passed_over(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    assert main(["claims", "--since", ""]) == main(["claims", "--preset", ""]) == 2
    for other in (["--preset", "paper"], ["--since", "HEAD"]):
        with pytest.raises(SystemExit):
            main(["claims", "--write", *other])


def test_changes_since_a_commit_that_git_does_not_know_are_refused(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    assert main(["claims", "--since", "no-such-commit"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: GitError: git archive: ") and "no-such-commit" in said and said.count("\n") == 1


def test_times_are_told_for_each_record_and_in_sum(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("COMPRESSIBLE_FIGURES", str(REPOSITORY / "figures"))
    assert main(["times"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| kwon2024/05")]
    record = json.loads((REPOSITORY / "figures/paper/kwon2024/05_completion.json").read_text())
    assert rows[0][1] == "paper" and float(rows[0][3]) == round(record["wall_seconds"] / 60, 1)
