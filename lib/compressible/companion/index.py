"""The index of one batch: a page beside its figures that shows what was built, and what failed and why.

It is one file without a script, opened from the disk as it is; every link in it is relative to its own folder.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from compressible.companion.records import files_below
from compressible.runtime import paths

NAME = "index.html"
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit): ")
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ccc; --bad: #a40000; --link: #0b57a4 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #444; --bad: #ff8a80;
  --link: #8ab8ff } }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper) }
a { color: var(--link) }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1rem }
article { border: 1px solid var(--line); border-radius: 6px; padding: .8rem }
article.failed { border-color: var(--bad) } .failed strong { color: var(--bad) }
img { width: 100%; height: auto; background: #fff; border-radius: 4px } p { margin: .4rem 0 }
pre { overflow-x: auto; font-size: .85rem } li { overflow-wrap: anywhere }
"""


@dataclass(frozen=True)
class Entry:
    """One figure under a label: its record where there is one, and the last line of its log where it failed."""

    id: str
    made: float  # when its record was written, in seconds of Unix time; 0 without one
    failure: str = ""
    failed: float = 0.0  # when that log was written
    record: Mapping[str, Any] = field(default_factory=dict)


def write_index(root: Path, preset: str, since: float = 0.0) -> Path:
    """Write `<root>/<preset>/index.html`, which shows the figures that lie there; returns its path.

    Args:
        root: Folder of all figures, such as `figures`.
        preset: Label of the batch, the folder below `root`.
        since: When the batch began, seconds of Unix time: figures made before are shown as kept from earlier.

    Example:
        >>> import tempfile
        >>> write_index(Path(tempfile.mkdtemp()), "quick").name
        'index.html'
    """
    found = entries(root, preset)
    built, kept, failed = _parted(found, since)
    counts = [f"{len(built)} built", f"{len(failed)} failed"] + ([f"{len(kept)} of an earlier run"] if kept else [])
    cards = [_card(root / preset, entry, since) for entry in (*failed, *built, *kept)]
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Figures, {escape(preset)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><main><h1>Figures of preset {escape(preset)}</h1>\n<p>{', '.join(counts)}; written "
        f'{datetime.now():%Y-%m-%d %H:%M}.</p>\n<div class="cards">\n{"".join(cards)}</div></main></body></html>\n'
    )
    return paths.write_atomic(root / preset / NAME, text)


def summary(
    root: Path,
    preset: str,
    since: float = 0.0,
    ids: Sequence[str] = (),
    unfinished: Sequence[str] = (),
    reached: bool = True,
) -> list[str]:
    """The last lines of a batch: what was built, where it lies, what failed with its log, and the page.

    Args:
        root: Folder of all figures.
        preset: Label of the batch.
        since: When the batch began, seconds of Unix time.
        ids: What was asked for; what of it was neither built nor failed is named. By default whatever is there.
        unfinished: What has begun and gave no figure; what of it left no log was stopped or killed.
        reached: Whether all that had to be made has begun, so that what is as it was is up to date.
    """
    found = [entry for entry in entries(root, preset) if not ids or entry.id in ids]
    built, kept, failed = _parted(found, since)
    failed = [entry for entry in failed if entry.id not in unfinished or entry.failed >= since]  # not the log of before
    lost = [id for id in unfinished if id not in {entry.id for entry in (*built, *failed)}]
    kept = [entry for entry in kept if entry.id not in lost]
    lines = [f"built: {', '.join(entry.id for entry in built) or 'nothing'}"]
    up_to_date = "as it was, up to date" if reached else "as it was, up to date or not reached"
    lines += [f"{up_to_date}: {', '.join(entry.id for entry in kept)}"] if kept else []
    lines += [f"not finished: {', '.join(lost)}"] if lost else []
    absent = [id for id in ids if id not in {entry.id for entry in found} | set(lost)]
    lines += [f"not reached: {', '.join(absent)}"] if absent else []
    lines += [f"failed: {entry.id}: {entry.failure}; log: {_log(root / preset, entry.id)}" for entry in failed]
    return [*lines, f"figures and records: {root / preset}", f"to look at: {root / preset / NAME}"]


def entries(root: Path, preset: str) -> list[Entry]:
    """Every figure under a label that has a record or a failed run, by id. A record older than a failure is kept."""
    folder = root / preset
    records = {f"{file.parent.name}/{file.stem}": file for file in files_below(folder, ".json")}
    logs = {f"{file.parent.name}/{file.stem}": file for file in files_below(folder / "failed", ".txt")}
    return [_entry(id, records.get(id), logs.get(id)) for id in sorted(records.keys() | logs.keys())]


def _entry(id: str, record: Path | None, log: Path | None) -> Entry:
    made = record.stat().st_mtime if record else 0.0
    ended = log.stat().st_mtime if log else -1.0
    failure = _last_line(log) if log and ended >= made else ""
    return Entry(id, made, failure, ended if failure else 0.0, _read(record) if record else {})


def _read(record: Path) -> dict[str, Any]:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    told: Any = content.get("claims")
    told = [each for each in told if isinstance(each, dict)] if isinstance(told, list) else []
    return content | {"claims": [each for each in told if isinstance(each.get("verdict"), str) and "id" in each]}


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if _ERROR.match(line)]  # an error's own line, of which further ones may follow
    return (named or lines)[-1][:200] if lines else "its log is empty"


def _parted(found: Sequence[Entry], since: float) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Built since then, of an earlier run, failed."""
    whole = [entry for entry in found if not entry.failure]
    built = [entry for entry in whole if entry.made >= since]
    return built, [entry for entry in whole if entry.made < since], [entry for entry in found if entry.failure]


def _log(folder: Path, id: str) -> Path:
    return folder / "failed" / f"{id}.txt"


def _card(folder: Path, entry: Entry, since: float) -> str:
    told = [f"<h2>{escape(entry.id)}</h2>"]
    if entry.failure:
        told += [f"<p><strong>failed</strong> ({_links(folder, _FAILED, entry.id)})</p>",
                 f"<pre>{escape(entry.failure)}</pre>"]  # fmt: skip
    if entry.made:
        told.append(_picture(folder, entry))
        earlier = "the figure of an earlier run, kept; " if entry.failure or entry.made < since else ""
        told += [f"<p>{earlier}{escape(_made(entry))}</p>", f"<p>{_links(folder, _FILES, entry.id)}</p>"]
        told.append(_verdicts(entry.record.get("claims") or []))
    return f'<article class="{"failed" if entry.failure else "built"}">{"".join(told)}</article>\n'


def _picture(folder: Path, entry: Entry) -> str:
    file = folder / f"{entry.id}.png"
    if not file.is_file():
        return "<p>no picture</p>"
    return f'<a href="{entry.id}.pdf"><img src="{entry.id}.png" alt="Figure {entry.id}" loading="lazy"></a>'


def _made(entry: Entry) -> str:
    seconds, device = entry.record.get("wall_seconds"), entry.record.get("device")
    parts = [f"made {datetime.fromtimestamp(entry.made):%Y-%m-%d %H:%M}"]
    parts += [f"{seconds:.0f} s"] if isinstance(seconds, int | float) else []
    return ", ".join([*parts, *([str(device)] if device else [])])


_FILES = {"PDF": "{id}.pdf", "record": "{id}.json", "arrays": "{id}.npz", "executed notebook": "executed/{id}.ipynb"}
_FAILED = {"log": "failed/{id}.txt", "notebook as far as it came": "failed/{id}.ipynb"}


def _links(folder: Path, files: Mapping[str, str], id: str) -> str:
    places = {name: place.format(id=id) for name, place in files.items()}
    return ", ".join(f'<a href="{place}">{name}</a>' for name, place in places.items() if (folder / place).is_file())


def _verdicts(claims: Sequence[Mapping[str, Any]]) -> str:
    rows = [f"<li><strong>{escape(each['verdict'])}</strong> {escape(str(each['id']).split('.', 1)[-1])}"
            f"{escape(': ' + str(each['reason']) if each.get('reason') else '')}</li>" for each in claims]  # fmt: skip
    verdicts = Counter(each["verdict"] for each in claims)
    told = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items())
    return f"<details><summary>{escape(told)}</summary><ul>{''.join(rows)}</ul></details>" if rows else ""
