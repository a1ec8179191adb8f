"""The front page: a card for each figure, with filters by paper, verdict and model."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from compressible.companion.claims import wording
from compressible.companion.claims.standing import VERDICTS
from compressible.companion.site import markup
from compressible.companion.site.cards import PAPERS, Card
from compressible.companion.site.notebook_page import downloads

INTRODUCTION = """\
# Gallery

The figures of three papers on low-rank training, each made by a notebook and held against its claims. A card shows a
figure at full scale with the question that it answers, what came out, how many of its claims have which verdict, and
what it was made on. [README](README.md) says what this is, [the table of claims](CLAIMS.md) has every claim with its
bound and interval."""


def page(cards: Sequence[Card], root: Path, carried: set[Path]) -> str:
    """Markdown of the page without its table of contents; `carried` gets the files that it links."""
    shown = [_card(card, anchor, root, carried) for card, anchor in zip(cards, _anchors(cards), strict=True)]
    return f'{INTRODUCTION}\n\n{_filters(cards)}\n<div class="gallery">{"".join(shown)}</div>'


def _anchors(cards: Sequence[Card]) -> list[str]:
    """The id of a figure for its first card, which links ask for, and with its preset for each further one."""
    ids = [card.id for card in cards]
    return [id if id not in ids[:k] else f"{id}.{cards[k].preset}" for k, id in enumerate(ids)]


def _filters(cards: Sequence[Card]) -> str:
    models = sorted({model for card in cards for model in card.models}, key=str.lower)
    found = {verdict for card in cards for verdict in card.verdicts}
    papers = {paper: title for paper, title in PAPERS.items() if any(card.paper == paper for card in cards)}
    verdicts = {markup.token(verdict): f"with {verdict}" for verdict in VERDICTS if verdict in found}
    lists = {"paper": papers, "verdict": verdicts, "model": {markup.token(model): model for model in models}}
    return markup.filters(lists, f"{len(cards)} figures")


def _card(card: Card, anchor: str, root: Path, carried: set[Path]) -> str:
    page, files = f"notebooks/{card.id}.html", downloads(card, root)
    carried.update(Path(place) for place in files.values())
    told = {"verdict": markup.tokens(list(card.verdicts)), "model": markup.tokens(card.models)}
    data = markup.data(paper=card.paper, **told)
    return (
        f'<article class="card" id="{escape(anchor)}"{data}>{_picture(card, files, page)}'
        f'<h2><a href="{page}">{markup.words(card.question or card.answer)}</a></h2>'
        f"<p>{markup.words(card.answer) if card.question else ''}</p>{_badges(card)}"
        f'<p class="made"><code>{escape(card.id)}</code> · {_made(card)}</p>{_links(files)}</article>'
    )


def _picture(card: Card, files: dict[str, str], page: str) -> str:
    place = files.get("picture (PNG)") or (quick_place(card) if card.quick else "")
    told = escape(f"Figure {card.id}, preset {card.preset or 'quick'}: {card.answer}")
    image = f'<img src="{place}" alt="{told}" loading="lazy">' if place else ""
    note = "" if card.record else '<p class="none">Not run at full scale: this is the quick preset.</p>'
    return f'<a class="picture" href="{page}" tabindex="-1">{image}</a>{note}'


def quick_place(card: Card) -> str:
    """Where the picture of the quick preset lies, for a figure that has no record."""
    return f"notebooks/{card.id}.png"


def _badges(card: Card) -> str:
    told = "".join(f'<li class="{markup.token(verdict)}">{n} {verdict}</li>' for verdict, n in card.verdicts.items())
    return f'<ul class="verdicts" aria-label="Verdicts">{told or "<li>no claim judged</li>"}</ul>'


def _made(card: Card) -> str:
    if card.record is None:
        return escape(" · ".join(card.models))
    seconds = card.record.get("wall_seconds") or 0
    parts = [f"preset {card.preset}", *card.models, wording.device(card.record), f"{seconds:.0f} s"]
    return escape(" · ".join(parts))


def _links(files: dict[str, str]) -> str:
    links = [f'<a href="{place}">{name}</a>' for name, place in files.items() if not name.startswith("picture")]
    return f'<p class="files">{" · ".join(links)}</p>' if links else ""
