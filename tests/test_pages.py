"""The pages that readers open say what the committed records show, name claims that exist, and lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

from compressible.companion import claims
from compressible.companion.claims import PASS, status, writing

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("notebooks/*/*.md")])
NOTEBOOKS = sorted(REPOSITORY.glob("notebooks/*/*.ipynb"))
README = REPOSITORY / "README.md"
MOST = 12_000  # bytes of the README
CLAIM_ID = re.compile(r"`([a-z]+\d*/(?:\d\d|table\d)_[a-z0-9_]+\.[a-z0-9_]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("COMPRESSIBLE_FIGURES", raising=False)
    return REPOSITORY


def test_pages_and_notebooks_show_the_verdicts_of_the_committed_records(checkout: Path) -> None:
    texts = claims.written(checkout).items()
    stale = [path.name for path, text in texts if not path.exists() or path.read_text() != text]
    assert stale == [], "python -m compressible claims --write"


def test_every_notebook_shows_its_record_in_its_first_cell(checkout: Path) -> None:
    firsts = {path: "".join(json.loads(path.read_text())["cells"][0]["source"]) for path in NOTEBOOKS}
    assert [path.name for path, text in firsts.items() if not text.startswith("# ")] == []
    assert [path.name for path, text in firsts.items() if text.count(writing.START) != 1] == []


def test_every_item_of_the_papers_names_what_exists(checkout: Path) -> None:
    known, items = claims.load_claims(), status.load_items()
    assert [
        id for item in items for id in item.notebooks if not (checkout / "notebooks" / f"{id}.ipynb").exists()
    ] == []
    patterns = [status.Item(item.paper, item.name, claims=[pattern]) for item in items for pattern in item.claims]
    assert [one.claims for one in patterns if not any(one.covers(claim.id) for claim in known)] == []
    assert [id for id in status.questions() if not (checkout / "notebooks" / f"{id}.ipynb").exists()] == []


def test_every_published_claim_bears_on_an_item() -> None:
    items = status.load_items(REPOSITORY / "data" / "status.toml")
    spoken = [claim for claim in claims.load_claims() if claim.group == "published" and claim.paper != "beyond"]
    assert [claim.id for claim in spoken if not any(item.covers(claim.id) for item in items)] == []


def test_the_readme_is_short() -> None:
    assert README.stat().st_size <= MOST


def test_the_readme_names_claims_that_exist() -> None:
    named = set(CLAIM_ID.findall(README.read_text()))
    assert len(named) >= 10
    assert named <= {claim.id for claim in claims.load_claims()}


def test_what_the_readme_calls_not_reproduced_has_no_pass(checkout: Path) -> None:
    section = README.read_text().split("## What did not reproduce")[1].split("\n## ")[0]
    points = [point for point in section.split("\n- ")[1:] if point.strip()]
    assert len(points) >= 8
    assert [point for point in points if not CLAIM_ID.search(point)] == []
    verdicts = {each.claim.id: each.verdict for each in claims.standings(checkout / "figures", claims.OWN)}
    assert [id for id in CLAIM_ID.findall(section) if verdicts[id] == PASS] == []


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_and_pictures_lead_somewhere(path: Path) -> None:
    lost = []
    for link in LINK.findall(prose(path)):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not link.startswith(("https://", "attachment:", "mailto:")):
            known = anchors(target) if anchor and target.suffix == ".md" and target.exists() else {anchor}
            lost += [] if target.exists() and anchor in known else [link]
    assert lost == []


def prose(path: Path) -> str:
    """The words of a page or of a notebook, without code."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"```.*?```|(?<!`)`[^`\n]+`", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Ids of a page, and its headings as GitHub makes ids of them."""
    text = path.read_text()
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        *re.findall(r'id="([^"]+)"', text),
        *(re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads),
    }
