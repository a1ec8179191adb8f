"""Generated pages: CLAIMS.md has every claim with its verdict, GALLERY.md every figure."""

from __future__ import annotations

from collections.abc import Sequence

from compressible.companion import notebooks
from compressible.companion.claims import wording
from compressible.companion.claims.standing import VERDICTS, Record, Standing, count
from compressible.companion.claims.statement import NOT_TESTED, PAPERS
from compressible.companion.claims.status import Item

GROUPS = {
    "published": "Published claims on the published setting",
    "transferred": "Published claims on another model, data or setting",
    "own": "Our own findings",
    "goal": "Engineering goals",
}
LEGEND = """\
**PASS**: the whole interval lies inside the bound. **FAIL**: it lies outside, one value refutes what is said of all,
or a run diverged. **INCONCLUSIVE**: these values show neither. **WEAK**: the interval lies inside a looser bound that
was set beforehand, or the bound holds and our interval does not meet the published one. **NOT TESTED**: no run of
that size was made, or too few of its runs have a value. Brackets are two-sided 95 % intervals: Student's t for means
(on logarithms for errors over decades, by Fisher's z for correlations), Clopper and Pearson's for shares, Nadeau and
Bengio's wider one where folds or splits share rows, by ranks where runs were stopped before they arrived. n says how
many values there are and of what: starts on one target and timings of one machine are not seeds. Claims that answer
one question together stand after Holm's correction. Bounds come from the published value, the theory or a margin
fixed before looking, as told behind them; **†** marks a claim or bound that was written after a result had been seen.
Rules: [rules.py](lib/compressible/companion/claims/rules.py); statements: [claims.toml](data/claims.toml); evidence:
the record of each figure, linked in [GALLERY.md](GALLERY.md)."""
HEADS = ["claim", "figure or theorem; source", "published", "bound", "ours", "n", "device, commit", "verdict"]
COUNTS = ["", "claims", *VERDICTS]
GENERATED = "<!-- Written by `python -m compressible claims --write`; edit data/claims.toml, or run a figure. -->"


def claims_page(standing: Sequence[Standing], items: Sequence[Item]) -> str:
    """All claims in four groups that are counted apart, within a group by paper and figure."""
    parts = ["# Claims", GENERATED, counts_table(standing), LEGEND]
    for group, found in _groups(standing).items():
        parts += [f"## {GROUPS[group]}", *_figures(_in_order(found, items), items)]
    return "\n\n".join(parts) + "\n"


def counts_table(standing: Sequence[Standing], linked: bool = True) -> str:
    """How many claims of each group have each verdict, linked to the groups of the same page."""
    names = {g: f"[{text}](#{slug(text)})" if linked else text for g, text in GROUPS.items()}
    rows = [[names[g], *_counted(found)] for g, found in _groups(standing).items()]
    return wording.table(COUNTS, rows)


def gallery_page(
    standing: Sequence[Standing], records: Sequence[Record], titles: dict[str, str], questions: dict[str, str]
) -> str:
    """One entry a figure: question, answer, picture, verdicts and links; `titles` are those of the notebooks."""
    head = ["# Gallery", GENERATED, "Each figure as its record drew it, at full scale. The verdicts are in [CLAIMS.md]"
            "(CLAIMS.md), the numbers in the records."]  # fmt: skip
    entries = [_entry(id, title, standing, records, questions.get(id, "")) for id, title in titles.items()]
    return "\n\n".join([*head, *entries]) + "\n"


def own_records(id: str, standing: Sequence[Standing], records: Sequence[Record]) -> list[Record]:
    """Records of the presets on which a figure's claims are judged, in the order of its presets; full scale first."""
    judged = {each.claim.preset for each in standing if each.claim.figure == id}
    order = [preset for preset in notebooks.presets(id) if preset in judged] or ["paper"]
    found = {record["preset"]: record for record in records if record["id"] == id}
    return [found[preset] for preset in order if preset in found]


def judged_on(record: Record, standing: Sequence[Standing]) -> list[Standing]:
    """The claims that were judged on a record."""
    place = record["id"], record["preset"]
    return [each for each in standing if each.record and (each.record["id"], each.record["preset"]) == place]


def counts_in_words(standing: Sequence[Standing]) -> str:
    """3 PASS, 1 FAIL: the verdicts that there are."""
    return ", ".join(f"{n} {verdict}" for verdict, n in count(standing).items() if n) or "no claim"


def made_on(record: Record) -> str:
    """Device, commit and seconds of a record."""
    return f"{wording.device(record)}, commit {wording.commit(record)}, {record.get('wall_seconds') or 0:.0f} s"


def _groups(standing: Sequence[Standing]) -> dict[str, list[Standing]]:
    groups = {group: [each for each in standing if each.claim.group == group] for group in GROUPS}
    return {group: found for group, found in groups.items() if found}


def _in_order(standing: list[Standing], items: Sequence[Item]) -> list[Standing]:
    def place(each: Standing) -> tuple[int, int, str]:
        first = next((i for i, item in enumerate(items) if item.covers(each.claim.id)), len(items))
        return PAPERS.index(each.claim.paper), first, each.claim.figure

    return sorted(standing, key=place)


def _figures(standing: list[Standing], items: Sequence[Item]) -> list[str]:
    parts = []
    for paper, figure in dict.fromkeys((each.claim.paper, each.claim.figure) for each in standing):
        mine = [each for each in standing if (each.claim.paper, each.claim.figure) == (paper, figure)]
        links = f"{counts_in_words(mine)}. [Notebook](notebooks/{figure}.ipynb), [figure](GALLERY.md#{figure})."
        rows = [_row(each, items) for each in mine]
        parts += [f"### {figure}" if paper == "beyond" else f"### {paper}: {figure}", links, wording.table(HEADS, rows)]
    return parts


def _row(each: Standing, items: Sequence[Item]) -> list[str]:
    claim, record = each.claim, each.record
    of = ", ".join(f"{item.paper} {item.name}" for item in items if item.covers(claim.id))
    made = f"{wording.device(record)}, {record['preset']}, {wording.commit(record)}" if record else ""
    name = f'<a id="{claim.id}"></a>`{claim.id}`' + (" †" if claim.after_looking else "")
    texts = [f"{of}; {claim.source}" if of else claim.source, wording.published(claim), wording.bound(claim)]
    texts += [wording.ours(each), wording.sample(each), made]
    return [f"{name}<br>{wording.cell(claim.statement)}", *map(wording.cell, texts), wording.verdict(each)]


def _counted(standing: Sequence[Standing]) -> list[str]:
    return [str(len(standing)), *(str(n) for n in count(standing).values())]


def _entry(id: str, title: str, standing: Sequence[Standing], records: Sequence[Record], question: str) -> str:
    mine = [each for each in standing if each.claim.figure == id]
    lines = [f'<a id="{id}"></a>', f"## {question or title}"]
    lines += [title if title.endswith("?") else f"{title}."] if question else []
    for record in own_records(id, standing, records):
        stem = f"figures/{record['preset']}/{id}"
        links = f"[notebook](notebooks/{id}.ipynb), [record]({stem}.json), [PDF]({stem}.pdf)"
        lines += [f"![{question or title}]({stem}.png)"]
        made = f"`{id}`, preset {record['preset']}, {made_on(record)}"
        lines += [f"{counts_in_words(judged_on(record, mine))} ({made}); {links}."]
    untested = [each for each in mine if each.verdict == NOT_TESTED]
    return "\n\n".join([*lines, *([f"{len(untested)} NOT TESTED."] if untested else [])])


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return heading.lower().replace(",", "").replace(" ", "-")
