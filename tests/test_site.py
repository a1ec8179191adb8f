"""The site: every link leads somewhere, nothing comes from outside, nothing is executed, and Chromium shows it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import browser_helpers
import pytest
from conftest import REPOSITORY

from compressible.companion import claims, notebooks, site
from compressible.companion.command_line import main
from compressible.companion.site import cards, links, mathjax

pytest.importorskip("sphinx", reason="the site's packages are not installed")
pytest.importorskip("furo", reason="the site's packages are not installed")
pytest.importorskip("myst_nb", reason="the site's packages are not installed")
in_browser = pytest.mark.skipif(bool(browser_helpers.lacking()), reason=browser_helpers.lacking())
LOADED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "object": "data"}
WIDTHS = (390, 1280)


class Page(HTMLParser):
    """What a page loads, where it links to, its anchors, and the attributes of each tag of some class."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = set()
        self.classes: list[tuple[str, dict[str, str]]] = []
        self.text = file.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        self.classes += [(name, found) for name in found.get("class", "").split()]
        if tag in LOADED and found.get(LOADED[tag]):
            self.loaded.append(found[LOADED[tag]])
        if tag == "link" and {"stylesheet", "icon", "preload"} & set(found.get("rel", "").split()):
            self.loaded.append(found["href"])
        if tag == "a" and "href" in found:
            self.linked.append(found["href"])

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [found for kind, found in self.classes if kind == name]


@cache
def read(file: Path) -> Page:
    return Page(file)


@cache
def records() -> tuple[list[cards.Card], list[claims.Standing]]:
    return cards.read(REPOSITORY)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The site of this repository, built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.delenv("COMPRESSIBLE_FIGURES", raising=False)
        front = site.build(tmp_path_factory.mktemp("site"))
    yield front.parent
    shutil.rmtree(front.parents[1])


def test_every_link_and_picture_leads_to_what_is_there(built: Path) -> None:
    lost = []
    for file in sorted(built.rglob("*.html")):
        for place in (*read(file).linked, *read(file).loaded):
            target, _, anchor = unquote(place.partition("?")[0]).partition("#")
            if re.match(r"[a-z]+:", place):
                continue
            to = Path(os.path.normpath(file.parent / target)) if target else file
            anchors = read(to).anchors if anchor and to.suffix == ".html" and to.is_file() else {anchor}
            if not to.is_file() or anchor not in anchors:
                lost.append(f"{file.relative_to(built)}: {place}")
    assert lost == []


def test_nothing_is_loaded_from_elsewhere(built: Path) -> None:
    outside = [place for file in built.rglob("*.html") for place in read(file).loaded
               if re.match(r"([a-z]+:)?//", place)]  # fmt: skip
    styles = [
        file for file in built.rglob("*.css") if re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", file.read_text())
    ]
    assert outside == [] and styles == []


def test_there_is_a_card_for_each_figure_with_what_it_must_tell(built: Path) -> None:
    front = read(built / "index.html")
    shown, _ = records()
    found = front.of_class("card")
    assert len(found) == len(shown) >= len(notebooks.ids())
    assert {card.id for card in shown} == set(notebooks.ids())
    for card, attributes in zip(shown, found, strict=True):
        assert attributes["data-paper"] == card.paper and attributes["data-model"] and card.answer
        if card.record:
            told = front.text.partition(f'id="{attributes["id"]}"')[2].partition("</article>")[0]
            seconds = f"{card.record['wall_seconds']:.0f} s"
            assert all(part in told for part in (card.file(".png"), f"preset {card.preset}", seconds)), card.id


def test_each_notebook_has_a_page_with_its_parameters_provenance_and_downloads(built: Path) -> None:
    for id in notebooks.ids():
        page = read(built / "notebooks" / f"{id}.html")
        assert f"../../notebooks/{id}.ipynb" in page.linked
        assert all(
            f">{name}</code>" in page.text
            for name in notebooks.defaults(notebooks.notebook_path(id))
            if name != "preset"
        )
        # Of presets alone: who tests may have figures under labels of their own, which no page has.
        for preset in set(notebooks.presets(id)) - {"quick"}:
            if (REPOSITORY / "figures" / preset / f"{id}.json").is_file():
                assert f"../../figures/{preset}/{id}.pdf" in page.linked, (id, preset)


def test_the_table_of_claims_holds_every_claim_with_its_verdict(built: Path) -> None:
    page = read(built / "CLAIMS.html")
    for each in records()[1]:
        row = page.text.partition(f'<tr id="{each.claim.id}"')[2].partition("</tr>")[0]
        assert f">{each.verdict}</strong>" in row, each.claim.id


def test_the_reference_holds_every_public_name(built: Path) -> None:
    import compressible as cd

    headings = "".join((built / "api" / f"{room}.html").read_text() for room in ("recovery", "descent", "finetuning"))
    assert 'id="compressible.descend"' in headings and 'id="compressible.recovery.spectra.effective_rank"' in headings
    everything = "".join(file.read_text() for file in (built / "api").glob("*.html"))
    assert [name for name in cd.__all__ if f"cd.{name}<" not in everything] == []


def test_no_docstring_is_misread(built: Path) -> None:
    misread = [str(file) for file in (built / "api").glob("*.html") if "problematic" in file.read_text()]
    assert misread == []


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[a](docs/usage.md#x)", "[a](docs/usage.md#x)"),
        ("[a](https://a.b/c)", "[a](https://a.b/c)"),
        ("[all](GALLERY.md#p/01)", '<a href="index.html#p/01">all</a>'),
        ("[`a`](LICENSE)", '<a href="LICENSE">`a`</a>'),
        ("[a](lib)", "a"),
        ("![a](figures/x.png)", "a"),
        ("`[a](LICENSE)`", "`[a](LICENSE)`"),
        ("```\n[a](LICENSE)\n```", "```\n[a](LICENSE)\n```"),
        ("[![a](LICENSE)](docs/usage.md)", '<a href="docs/usage.html"><img src="LICENSE" alt="a"></a>'),
    ],
)
def test_links_are_those_of_the_site(written: str, shown: str) -> None:
    carried: set[Path] = set()
    assert links.for_site(written, "README.md", ["docs/usage.md"], REPOSITORY, carried) == shown
    assert carried == (
        {Path("LICENSE")} if "LICENSE" in shown and "`[" not in written and "\n" not in written else set()
    )


def test_a_build_executes_nothing_and_does_without_mathjax(add_notebook, checkout, monkeypatch, capsys) -> None:
    id = add_notebook("01_good", "from pathlib import Path", "Path('ran').touch(); raise ValueError")
    notebook = checkout / "notebooks" / f"{id}.ipynb"
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    content.cells.insert(0, nbformat.v4.new_markdown_cell("# Good when $x > 0$\n\nText."))
    nbformat.write(content, notebook)
    shutil.copytree(REPOSITORY / "docs" / "site", checkout / "docs" / "site")
    (checkout / "data").mkdir()
    (checkout / "data" / "claims.toml").write_text("")
    monkeypatch.setattr(mathjax, "fetch", lambda target: "no npm here")
    monkeypatch.setattr("compressible.companion.site.api.pages", dict)
    assert main(["site"]) == 0
    assert "built in" in capsys.readouterr().out
    assert list(checkout.rglob("ran")) == []
    page = read(checkout / "build" / "site" / "html" / "notebooks" / f"{id}.html")
    assert "Formulas are shown as TeX" in page.text and '<code class="math">x &gt; 0</code>' in page.text


def test_a_folder_that_is_no_site_is_never_removed(add_notebook, checkout, tmp_path, capsys) -> None:
    (tmp_path / "www" / "html").mkdir(parents=True)
    (tmp_path / "www" / "html" / "index.html").write_text("mine")
    assert main(["site", "--out", str(tmp_path / "www")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'www' / 'html'} is there already and no site of ours" in said and said.count("\n") == 1
    assert (tmp_path / "www" / "html" / "index.html").read_text() == "mine"
    assert [file.name for file in (tmp_path / "www").iterdir()] == ["html"]


def test_a_cache_that_cannot_be_written_costs_no_formulas(tmp_path, monkeypatch) -> None:
    (tmp_path / "cache").write_text("a file where the cache should be")
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mathjax, "_packed", lambda: b"formulas")
    assert mathjax.fetch(tmp_path / "tex-svg.js") == "" and (tmp_path / "tex-svg.js").read_bytes() == b"formulas"


def test_mathjax_is_not_asked_for_where_the_network_is_forbidden(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMPRESSIBLE_OFFLINE", "1")
    monkeypatch.setenv("PATH", "")  # npm would not be found
    assert mathjax.fetch(tmp_path / "tex-svg.js") == "SourceError: not tried, COMPRESSIBLE_OFFLINE is 1"


def test_another_file_in_the_place_of_mathjax_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mathjax, "_packed", lambda: (_ for _ in ()).throw(ValueError("has the sha256 0")))
    assert "has the sha256 0" in mathjax.fetch(tmp_path / "tex-svg.js")
    assert not (tmp_path / "tex-svg.js").exists()


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    with browser_helpers.browser() as started:
        yield started


@in_browser
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("place", ["index.html", "CLAIMS.html", "README.html", "api/recovery.html",
                                   "notebooks/yaras2024/03_svd_evolution.html"])  # fmt: skip
def test_a_page_fits_shows_its_pictures_and_asks_no_one(place: str, width: int, built: Path, chromium) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 900})
    troubles = browser_helpers.watched(page)
    page.goto((built / place).as_uri())
    page.evaluate("document.querySelectorAll('img').forEach((img) => { img.loading = 'eager'; })")
    page.wait_for_function("[...document.images].every((img) => img.complete)")
    assert page.evaluate("[...document.images].filter((img) => !img.naturalWidth).map((img) => img.src)") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert troubles == []
    page.close()


@in_browser
def test_formulas_are_set_without_an_error(built: Path, chromium) -> None:
    if not (built / "_static" / "mathjax" / "tex-svg.js").exists():
        pytest.skip("MathJax could not be fetched, and formulas are shown as TeX")
    page = chromium.new_page()
    for id in notebooks.ids():
        page.goto((built / "notebooks" / f"{id}.html").as_uri())
        page.wait_for_function("window.MathJax?.startup?.promise !== undefined")
        page.evaluate("MathJax.startup.promise")
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0, id
    assert page.locator("mjx-container").count() > 0
    page.close()


@in_browser
def test_cards_are_filtered_and_reached_by_the_keyboard(built: Path, chromium) -> None:
    page = chromium.new_page()
    page.goto((built / "index.html").as_uri())
    shown, _ = records()
    page.select_option("select[name=paper]", "kwon2024")
    page.select_option("select[name=verdict]", "fail")
    expected = [card.id for card in shown if card.paper == "kwon2024" and "FAIL" in card.verdicts]
    assert 0 < len(expected) < len(shown)
    assert page.locator(".card:visible").count() == len(expected)
    assert page.locator("output").inner_text().startswith(f"{len(expected)} of {len(shown)}")
    page.focus("select[name=model]")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == f"notebooks/{expected[0]}.html"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.close()


@in_browser
def test_claims_are_sorted_and_searched(built: Path, chromium) -> None:
    page = chromium.new_page()
    page.goto((built / "CLAIMS.html").as_uri())
    column = "[...document.querySelectorAll('.sortable tbody tr')].map((row) => row.cells[6].dataset.sort)"
    for direction in (1, -1):
        page.focus(".sortable th:nth-child(7) button")
        page.keyboard.press("Enter")
        values = [float(value) for value in page.evaluate(column) if value]
        assert len(values) > 100 and values == sorted(values, reverse=direction < 0)
    assert page.get_attribute(".sortable th:nth-child(7)", "aria-sort") == "descending"
    page.fill("input[name=words]", "exactly_2r_move")
    assert page.locator(".sortable tbody tr:visible").count() == 1
    page.close()


@in_browser
def test_dark_mode_is_dark_and_legible(built: Path, chromium) -> None:
    page = chromium.new_page(color_scheme="dark")
    page.goto((built / "index.html").as_uri())
    read_colour = "(place, what) => getComputedStyle(document.querySelector(place))[what].match(/[\\d.]+/g).map(Number)"
    back = page.evaluate(f"({read_colour})('body', 'backgroundColor')")
    for place in ("h1", ".card p", ".pass", ".fail", ".card h2 a"):
        assert contrast(back, page.evaluate(f"({read_colour})('{place}', 'color')")) >= 4.5, place
    page.close()


def contrast(first: list[float], second: list[float]) -> float:
    """The ratio of WCAG 2: 4.5 is what text needs."""
    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: list[float]) -> float:
    parts = [value / 255 for value in colour[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
