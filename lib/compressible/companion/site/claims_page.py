"""All claims in one table that can be sorted and filtered, with the data of CLAIMS.md."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from compressible.companion.claims import pages, wording
from compressible.companion.claims.standing import VERDICTS, Standing, count
from compressible.companion.claims.status import Item
from compressible.companion.site import markup

HEADS = ("verdict", "claim", "paper", "figure or theorem; source", "published", "bound", "ours", "n", "device, commit")


def page(standing: Sequence[Standing], items: Sequence[Item]) -> str:
    """Markdown of the page: counts of each group, the table, what the verdicts mean; links are the repository's."""
    parts = ["# Claims", _counts(standing), _filters(standing), _table(standing, items)]
    return "\n\n".join([*parts, "## What the verdicts mean", pages.LEGEND])


def _counts(standing: Sequence[Standing]) -> str:
    rows = []
    for group, title in pages.GROUPS.items():
        found = [each for each in standing if each.claim.group == group]
        cells = [f'<th scope="row">{title}</th>', *(f"<td>{n}</td>" for n in (len(found), *count(found).values()))]
        rows.append((cells, f' id="{pages.slug(title)}"'))
    heads = [f'<th scope="col">{head or "group"}</th>' for head in pages.COUNTS]
    return markup.framed(heads, rows, "Verdicts of each group")


def _filters(standing: Sequence[Standing]) -> str:
    papers: dict[str, str] = {each.claim.paper: each.claim.paper for each in standing}
    verdicts = {markup.token(verdict): verdict for verdict in VERDICTS}
    lists = {"group": pages.GROUPS, "paper": papers, "verdict": verdicts}
    return markup.filters(lists, f"{len(standing)} claims", search=True)


def _table(standing: Sequence[Standing], items: Sequence[Item]) -> str:
    heads = [f'<th scope="col" aria-sort="none"><button type="button">{head}</button></th>' for head in HEADS]
    rows = [_row(each, items) for each in standing]
    return markup.framed(heads, rows, "Claims", "docutils sortable")


def _row(each: Standing, items: Sequence[Item]) -> tuple[list[str], str]:
    claim, record = each.claim, each.record
    of = ", ".join(f"{item.paper} {item.name}" for item in items if item.covers(claim.id))
    made = f"{wording.device(record)}, {record['preset']}, {wording.commit(record)}" if record else ""
    value = each.judged["value"] if each.judged else None
    cells = {
        "verdict": (_verdict(each), str(VERDICTS.index(each.verdict))),
        "claim": (_statement(each), claim.id),
        "paper": (escape(claim.paper), claim.paper),
        HEADS[3]: (markup.words(f"{of}; {claim.source}" if of else claim.source), of),
        "published": (markup.words(wording.published(claim)), ""),
        "bound": (markup.words(wording.bound(claim)), ""),
        "ours": (escape(wording.ours(each)), "" if value is None else repr(float(value))),
        "n": (escape(wording.sample(each)), str(each.judged["seeds"]) if each.judged else ""),
        "device, commit": (escape(made), made),
    }
    row = [f'<td data-label="{head}" data-sort="{escape(by)}">{shown}</td>' for head, (shown, by) in cells.items()]
    told = markup.data(group=claim.group, paper=claim.paper, verdict=markup.token(each.verdict))
    return row, f' id="{escape(claim.id)}"{told}'


def _verdict(each: Standing) -> str:
    reason = f"<br>{markup.words(each.reason)}" if each.reason else ""
    return f'<strong class="{markup.token(each.verdict)}">{each.verdict}</strong>{reason}'


def _statement(each: Standing) -> str:
    claim, mark = each.claim, " †" if each.claim.after_looking else ""
    page = Path("notebooks", f"{claim.figure}.html").as_posix()
    return f'{markup.words(claim.statement)}{mark}<br><a href="{page}"><code>{escape(claim.id)}</code></a>'
