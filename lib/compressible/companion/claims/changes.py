"""Which verdicts changed between a commit and this checkout, as lines of CHANGELOG.md, each with the reason.

Both sides are judged by the rules of today: the claims and records of the commit, and those that are here. So what
differs comes from a claim that is another now, or from a record that was made anew; what that record says of how it was
made tells why.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from compressible.companion import git
from compressible.companion.claims import wording
from compressible.companion.claims.standing import OWN, Standing, standings
from compressible.companion.claims.statement import NOT_TESTED, load_claims
from compressible.runtime import paths

WIDTH = 120
HELD = {"parameters": "other parameters", "data": "other data", "device": "another device", "library": "other code"}


def since(commit: str) -> str:
    """The changed verdicts since a commit, in markdown.

    Raises:
        GitError: git does not know the commit, or it has no records and claims.
        ValueError: its claims are not as they are read today.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        git.export(root, commit, "figures", "data/claims.toml")
        before = standings(root / "figures", OWN, load_claims(root / "data" / "claims.toml"))
    return changes(before, standings(paths.repository() / "figures", OWN))


def changes(before: Sequence[Standing], after: Sequence[Standing]) -> str:
    """The lines for two lists of standings: figures in their order, below each its verdicts that are others now."""
    former = {each.claim.id: each for each in before}
    told = {figure: [line for each in after if each.claim.figure == figure and (line := _line(former, each))]
            for figure in dict.fromkeys(each.claim.figure for each in after)}  # fmt: skip
    gone = former.keys() - {each.claim.id for each in after}
    blocks = [_wrapped(f"- {figure}:") + [part for line in lines for part in _wrapped(line, "  ")]
              for figure, lines in told.items() if lines]  # fmt: skip
    blocks += [_wrapped(f"- Claims that are no more: {', '.join(f'`{id}`' for id in sorted(gone))}.")] if gone else []
    return "\n".join(line for block in blocks for line in block) + "\n" if blocks else "no verdict changed\n"


def _line(former: Mapping[str, Standing], now: Standing) -> str:
    """What became of one verdict; nothing where it is as it was."""
    name, was = now.claim.id.partition(".")[2], former.get(now.claim.id)
    if was is None:
        return f"- `{name}` is new: {now.verdict}, {wording.ours(now)}." if now.verdict != NOT_TESTED else ""
    if was.verdict == now.verdict:
        return ""
    values = " to ".join(text for each in (was, now) if (text := wording.ours(each)))
    return f"- `{name}`, {was.verdict} to {now.verdict}: {values or now.reason}; {_why(was, now)}."


def _why(was: Standing, now: Standing) -> str:
    """What is another: the claim, or how its record was made."""
    why = ["the claim is another"] if was.claim.rule() != now.claim.rule() else []
    old, new = was.record or {}, now.record or {}
    if not old or not new:
        return ", ".join([*why, "no record before" if new else "no record that suffices now"])
    if old.get("run") != new.get("run") or old.get("created") != new.get("created"):
        other = [text for name, text in HELD.items() if old.get(name) != new.get(name)]
        torch = [of.get("versions", {}).get("torch", "?") for of in (old, new)]
        other += [f"PyTorch {torch[0]} to {torch[1]}"] if torch[0] != torch[1] else []
        why.append(f"made anew at {wording.commit(new)} ({', '.join(other) or 'nothing else is another'})")
    return ", ".join(why) or "judged with other claims of its question"


def _wrapped(line: str, indent: str = "") -> list[str]:
    fill = textwrap.TextWrapper(WIDTH, indent, f"{indent}  ", break_long_words=False, break_on_hyphens=False)
    return fill.wrap(line)
