"""Every verdict again, from data/claims.toml and the records in figures/, by code that shares nothing with the library.

    python tests/independent_verdicts.py

reads the rules as the docstring of lib/compressible/companion/claims/rules.py words them, prints how many verdicts it
reached, and each claim of which CLAIMS.md shows another verdict, value or interval; it exits with 1 if there is any.

It goes another way than the library on purpose. A p value is nowhere computed as a tail: it is the smallest alpha for
which the interval of level 1 - alpha still shows the claim or its contrary, found by bisection. Intervals are scipy's.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import scipy.stats

REPOSITORY = Path(__file__).resolve().parents[1]
VERDICTS = ("PASS", "WEAK", "FAIL", "INCONCLUSIVE", "NOT TESTED")
NOWHERE = "NOT TESTED", None, None, None


def verdicts(root: Path = REPOSITORY) -> dict[str, tuple]:
    """(verdict, value, low, high) by a claim's id, each judged on the record of the preset that the claim names.

    Claims whose metric the record lacks are left out: what was judged then cannot be told from the record alone.
    """
    claims = tomllib.loads((root / "data" / "claims.toml").read_text(encoding="utf-8"))["claim"]
    found: dict[str, tuple] = {}
    for place in sorted({(claim.get("preset", "paper"), claim["id"].split(".")[0]) for claim in claims}):
        mine = [claim for claim in claims if (claim.get("preset", "paper"), claim["id"].split(".")[0]) == place]
        file = root / "figures" / place[0] / f"{place[1]}.json"
        if not file.exists():
            found |= {claim["id"]: NOWHERE for claim in mine}
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        found |= of_one_record(mine, record["parameters"], metrics_of(record, file))
    return {claim["id"]: found[claim["id"]] for claim in claims if claim["id"] in found}


def metrics_of(record: dict, file: Path) -> dict:
    """Metrics of a record with the infinities that JSON has no number for, and the arrays that lie beside it."""
    known = {}
    if record.get("arrays") and file.with_suffix(".npz").exists():
        with np.load(file.with_suffix(".npz")) as arrays:
            known = {name: arrays[name].tolist() for name in arrays.files if arrays[name].ndim == 1}
    return known | record["metrics"] | {name: json.loads(text) for name, text in record.get("not_finite", {}).items()}


def of_one_record(claims: list[dict], parameters: dict, metrics: dict) -> dict[str, tuple]:
    """What the claims come to on one run: first each alone, then those of a question together."""
    found, shown = {}, {}
    for claim in claims:
        if claim["metric"] in metrics or not large_enough(claim, parameters):
            found[claim["id"]], shown[claim["id"]] = alone(claim, parameters, metrics)
    for question in {claim.get("question") for claim in claims} - {None, ""}:
        asked = [c["id"] for c in claims if c.get("question") == question and shown.get(c["id"]) is not None]
        for lost in set(asked) - kept_by_holm({id: shown[id] for id in asked}):
            found[lost] = ("INCONCLUSIVE", *found[lost][1:])
    return found


def kept_by_holm(p_values: dict[str, float]) -> set[str]:
    """Holm's step-down test at 5 %: from the smallest p value on, until one exceeds its share of the risk."""
    kept: set[str] = set()
    for id in sorted(p_values, key=lambda id: p_values[id]):
        if p_values[id] * (len(p_values) - len(kept)) > 0.05 * (1 + 1e-9):
            break
        kept.add(id)
    return kept


def large_enough(claim: dict, parameters: dict) -> bool:
    """Whether the run has what the claim requires of its parameters."""

    def same(got: object, need: object) -> bool:
        if isinstance(need, list):
            return (
                isinstance(got, list)
                and len(got) == len(need)
                and all(same(*pair) for pair in zip(got, need, strict=True))
            )
        if isinstance(need, str | bool) or isinstance(got, str | bool | list):
            return got == need and type(got) is type(need)
        return abs(got - need) <= 1e-9 * max(abs(got), abs(need))

    for name, need in claim.get("requires", {}).items():
        if name not in parameters:
            return False
        got = parameters[name]
        if isinstance(need, str | bool | list):
            fits = same(got, need)
        elif isinstance(need, dict) and "exactly" in need:
            fits = same(got, need["exactly"])
        else:
            size = len(got) if isinstance(got, list) else got
            limits = need if isinstance(need, dict) else {"at_least": need}
            fits = limits.get("at_least", -math.inf) <= size <= limits.get("at_most", math.inf)
        if not fits:
            return False
    return True


def alone(claim: dict, parameters: dict, metrics: dict) -> tuple[tuple, float | None]:
    """The verdict on one claim with what is shown beside it, and its p value if it has one."""
    if not large_enough(claim, parameters):
        return NOWHERE, None
    found = metrics[claim["metric"]]
    raw = np.array([math.nan if one is None else one for one in (found if isinstance(found, list) else [found])], float)
    if raw.size < claim.get("seeds", 1):
        return NOWHERE, None
    scale = claim.get("scale", "linear")
    stopped = np.isposinf(raw) & claim.get("censored", False)
    lost = ~np.isfinite(raw) & ~stopped
    if scale == "log":
        lost |= raw < 0
    if scale == "correlation":
        lost |= np.abs(raw) > 1 + 1e-9
        raw = np.clip(raw, -1, 1)
    if lost.any():
        return ("FAIL", None, None, None), None
    values = np.abs(raw) if scale == "abs" else raw
    below = claim.get("censored", False) and scale == "log" and (raw == 0).any()  # of a ratio, the divisor was stopped
    span = spans(claim, values, bool(stopped.any() or below)) if values.size > 1 else None
    single = span is None or claim["judge"] == "true" or claim.get("every", False)
    verdict = of_each(claim, values) if single else of_interval(claim, *span(0.05))
    value, low, high = (values[0], None, None) if span is None else (span(1.0)[0], *span(0.05))
    ends = (value, value) if span is None else (low, high)
    published = claim.get("published_range")
    if verdict == "PASS" and published is not None and (ends[0] > published[1] or ends[1] < published[0]):
        verdict = "WEAK"
    return (verdict, float(value), low, high), None if single else p_value(claim, span)


def holds(claim: dict, value: float, key: str = "bound") -> bool:
    """Whether one number is inside the bound, or the one named `key`."""
    bound = claim.get(key)
    return {
        "greater_than_zero": lambda: value > 0,
        "true": lambda: value == 1,
        "at_most": lambda: value <= bound,
        "at_least": lambda: value >= bound,
        "share": lambda: value >= bound,
        "between": lambda: bound[0] <= value <= bound[1],
    }[claim["judge"]]()


def of_each(claim: dict, values: np.ndarray) -> str:
    """One value, or what is said of every value."""
    ratios = claim.get("censored", False) and claim.get("scale") == "log"
    if np.isinf(values).any() or (ratios and (values == 0).any()):  # of a ratio, the divisor was stopped
        return "INCONCLUSIVE"
    if all(holds(claim, value) for value in values):
        return "PASS"
    return "WEAK" if "weak" in claim and all(holds(claim, value, "weak") for value in values) else "FAIL"


def of_interval(claim: dict, low: float, high: float) -> str:
    """What an interval shows: bounds are intervals, so that both ends inside means wholly inside."""
    if holds(claim, low) and holds(claim, high):
        return "PASS"
    if "weak" in claim and holds(claim, low, "weak") and holds(claim, high, "weak"):
        return "WEAK"
    beyond = {
        "at_most": lambda: low > claim["bound"],
        "at_least": lambda: high < claim["bound"],
        "share": lambda: high < claim["bound"],
        "greater_than_zero": lambda: high <= 0,
        "between": lambda: low > claim["bound"][1] or high < claim["bound"][0],
    }[claim["judge"]]
    return "FAIL" if beyond() else "INCONCLUSIVE"


def p_value(claim: dict, span) -> float:
    """The smallest alpha at which the interval shows what it shows at 5 %; 1 where that is nothing."""
    shown = of_interval(claim, *span(0.05))
    if shown == "INCONCLUSIVE":
        return 1.0
    # A WEAK claim is one of the weaker bound, and at a smaller alpha nothing shows more than at a larger one.
    small, large = -300.0, math.log10(0.05)
    for _ in range(60):
        middle = (small + large) / 2
        if of_interval(claim, *span(10**middle)) == shown:
            large = middle
        else:
            small = middle
    return 10**large


def spans(claim: dict, values: np.ndarray, ranks: bool):
    """The interval of level 1 - alpha as a function of alpha; at alpha = 1 both ends are the estimate."""
    count, scale = len(values), claim.get("scale", "linear")
    if claim["judge"] in ("true", "share"):
        test = scipy.stats.binomtest(int(values.sum()), count)
        return lambda alpha: (values.mean(),) * 2 if alpha == 1 else tuple(test.proportion_ci(1 - alpha, "exact"))
    if ranks:
        return lambda alpha: by_ranks(np.sort(values), alpha)
    if values.min() == values.max():
        return lambda alpha: (float(values[0]),) * 2
    if scale == "log":
        values = np.log(np.where(values == 0, sys.float_info.min, values))
    middle = values.sum() / count
    spread = math.sqrt(((values - middle) ** 2).sum() / (count - 1))
    error = spread * math.sqrt(1 / count + claim.get("test_over_train", 0))

    def span(alpha: float) -> tuple[float, float]:
        reach = scipy.stats.t.isf(alpha / 2, count - 1) * error
        if scale == "log":
            return math.exp(middle - reach), math.exp(min(middle + reach, 700))
        if scale == "abs":
            return middle * math.exp(-reach / middle), middle * math.exp(min(reach / middle, 700))
        if scale == "correlation":
            z, reach = math.atanh(middle), reach / (1 - middle**2)
            return math.tanh(z - reach), math.tanh(z + reach)
        return middle - reach, middle + reach

    return span


def by_ranks(ordered: np.ndarray, alpha: float) -> tuple[float, float]:
    """Ends of the sign test's interval of the median; at alpha = 1 the median itself."""
    count = len(ordered)
    if alpha == 1:
        pair = ordered[(count - 1) // 2], ordered[count // 2]
        return (math.inf if math.isinf(pair[1]) else (pair[0] + pair[1]) / 2,) * 2
    ranks = [k for k in range(1, count // 2 + 1) if scipy.stats.binom.cdf(k - 1, count, 0.5) <= alpha / 2]
    return (ordered[max(ranks) - 1], ordered[-max(ranks)]) if ranks else (-math.inf, math.inf)


def shown_in(page: str) -> dict[str, tuple]:
    """Verdict, value and interval of each claim in the tables of CLAIMS.md."""
    shown: dict[str, tuple] = {}
    number = r"(-?(?:\d[\d.]*(?:e[-+]?\d+)?|inf))"
    heads: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        heads = cells if cells[:1] == ["claim"] else heads
        if found := re.match(r'<a id="([^"]+)">', cells[0]) if cells else None:
            row = dict(zip(heads, cells, strict=True))
            numbers = re.match(rf"{number}(?: \[{number}, {number}\])?", row["ours"])
            verdict = next(v for v in VERDICTS if row["verdict"].startswith(f"**{v}**"))
            ends = [None if n is None else float(n) for n in numbers.groups()] if numbers else [None] * 3
            shown[found[1]] = verdict, *ends
    return shown


def differences(ours: dict[str, tuple], theirs: dict[str, tuple]) -> list[str]:
    """Claims on which two ways of judging differ, in the verdict or in the first three digits of what is shown."""
    lines = []
    for id, mine in ours.items():
        other = theirs.get(id, ("no verdict", None, None, None))
        close = mine[0] == "NOT TESTED" or all(alike(a, b) for a, b in zip(mine[1:], other[1:], strict=True))
        if mine[0] != other[0] or not close:
            lines.append(f"{id}: {mine[0]} {mine[1:]} here, {other[0]} {other[1:]} there")
    return lines


def alike(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=6e-3, abs_tol=1e-300)


def main() -> int:
    ours = verdicts()
    counts = ", ".join(f"{sum(v[0] == verdict for v in ours.values())} {verdict}" for verdict in VERDICTS)
    print(f"{len(ours)} verdicts from the records: {counts}.")
    found = differences(ours, shown_in((REPOSITORY / "CLAIMS.md").read_text(encoding="utf-8")))
    print("\n".join(found) or "CLAIMS.md shows the same.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
