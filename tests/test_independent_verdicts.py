"""The verdicts of the library beside those of code that shares nothing with it, on records and on made-up claims."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import independent_verdicts as independent
import numpy as np
import pytest

from compressible.companion import claims

REPOSITORY = Path(__file__).resolve().parents[1]
ID = "kwon2024/05_completion"


def test_the_library_judges_the_records_as_other_code_does() -> None:
    page = claims.table(REPOSITORY / "figures", format="markdown", preset="own")
    shown, found = independent.shown_in(page), independent.verdicts()
    assert len(shown) == len(claims.load_claims())
    assert sum(verdict[0] != "NOT TESTED" for verdict in found.values()) > 100
    assert independent.differences(found, shown) == []


def test_other_code_imports_nothing_of_the_library() -> None:
    assert "import compressible" not in (text := Path(independent.__file__).read_text()) and "from comp" not in text


BOUNDS: dict[str, Any] = {"at_most": 0.6, "at_least": 0.4, "between": [0.3, 0.7], "greater_than_zero": None}
WEAKER = {"at_most": 0.8, "at_least": 0.2, "between": [0.1, 0.9], "greater_than_zero": None}


def entry(generator: np.random.Generator, place: int) -> dict[str, Any]:
    """A claim with keys drawn at random, of those that fit together."""

    def maybe(share: float = 0.3) -> bool:
        return bool(generator.random() < share)

    judge = str(generator.choice(["at_most", "at_least", "between", "greater_than_zero", "true", "share"]))
    truth = judge in ("true", "share")
    found: dict[str, Any] = {"id": f"{ID}.m{place}", "paper": "P2", "statement": "s", "metric": f"m{place}"}
    found |= {"judge": judge, "source": "here", "group": "own", "bound_from": "a margin", "unit": "seed"}
    bound = 0.4 if judge == "share" else BOUNDS.get(judge)
    found |= {} if bound is None else {"bound": bound}
    if WEAKER.get(judge) and maybe():
        found["weak"] = WEAKER[judge]
    scales = ["linear", "correlation"] if judge == "greater_than_zero" else ["linear", "log", "abs", "correlation"]
    found["scale"] = "linear" if truth else str(generator.choice(scales))
    found["every"] = maybe(0.1) and not truth
    if found["scale"] in ("linear", "log") and not truth and not found["every"] and maybe():
        found["censored"] = True
    elif judge != "share" and maybe():
        found |= {"unit": "fold", "test_over_train": 0.25}
    if maybe():
        low = float(generator.uniform(0, 0.9))
        found |= {"group": "published", "published_range": [low, low + 0.1]}
    if maybe(0.7):
        found["question"] = str(generator.choice(["one", "two"]))
    return found | {"seeds": int(generator.choice([1, 3]))}


def values(generator: np.random.Generator, claim: dict[str, Any]) -> list[float | bool]:
    """Values about the claim's bounds, now and then with one that is not finite."""
    count = int(generator.choice([1, 2, 5, 7, 12]))
    if claim["judge"] in ("true", "share"):
        return (generator.random(count) < generator.choice([0.3, 0.9, 1.0])).tolist()
    spread = generator.choice([0.0, 0.02, 0.2])
    found = generator.choice([0.1, 0.5, 0.9]) + spread * generator.standard_normal(count)
    found = np.clip(np.abs(found) if claim["scale"] == "log" else found, -1, 1)
    if generator.random() < 0.15:
        found[0] = generator.choice([math.nan, math.inf, -math.inf])
    return found.tolist()


@pytest.mark.parametrize("seed", range(40))
def test_the_library_judges_made_up_claims_as_other_code_does(seed: int) -> None:
    generator = np.random.default_rng(seed)
    entries = [entry(generator, place) for place in range(12)]
    metrics = {each["metric"]: values(generator, each) for each in entries}
    result = SimpleNamespace(parameters={}, arrays={}, metrics=metrics)
    ours = claims.judge(ID, result, [claims.Claim(**each) for each in entries])
    theirs = independent.of_one_record(entries, {}, metrics)
    for verdict in ours:
        other = theirs[verdict.id]
        assert verdict.verdict == other[0], (verdict, other)
        assert [verdict.value, verdict.low, verdict.high] == [v if v is None else pytest.approx(v) for v in other[1:]]


def test_made_up_claims_meet_every_verdict() -> None:
    met: set[str] = set()
    for seed in range(40):
        generator = np.random.default_rng(seed)
        entries = [entry(generator, place) for place in range(12)]
        metrics = {each["metric"]: values(generator, each) for each in entries}
        met |= {verdict[0] for verdict in independent.of_one_record(entries, {}, metrics).values()}
    assert met == set(independent.VERDICTS)


PAGE = """
| claim | ours | n | verdict |
| --- | --- | --- | --- |
| <a id="a.x"></a>`a.x`<br>One \\| two. | 0.123 [0.1, 0.2] | 5 seeds | **PASS** |
| <a id="a.y"></a>`a.y`<br>Three. | 1.1e-08 | 1 run | **FAIL**: outside |
| <a id="a.z"></a>`a.z`<br>Four. |  |  | **NOT TESTED**: no record |
"""


def test_the_page_is_read_and_differences_are_named() -> None:
    shown = independent.shown_in(PAGE)
    assert shown == {
        "a.x": ("PASS", 0.123, 0.1, 0.2),
        "a.y": ("FAIL", 1.1e-8, None, None),
        "a.z": ("NOT TESTED", None, None, None),
    }
    same = {"a.x": ("PASS", 0.1231, 0.1, 0.2), "a.z": ("NOT TESTED", None, None, None)}
    assert independent.differences(same, shown) == []
    for other in (("WEAK", 0.1231, 0.1, 0.2), ("PASS", 0.125, 0.1, 0.2), ("PASS", 0.1231, 0.1, 0.3)):
        (line,) = independent.differences({"a.x": other}, shown)
        assert line.startswith("a.x: ")
    (line,) = independent.differences({"a.q": ("PASS", 1.0, None, None)}, shown)
    assert "no verdict" in line


def test_infinities_and_arrays_of_a_record_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    np.savez(file.with_suffix(".npz"), long=np.arange(40.0), curves=np.ones((2, 2)))
    record = {"metrics": {"m": [1.0, None], "n": 2}, "not_finite": {"m": "[1.0, Infinity]"}, "arrays": {"sha256": ""}}
    found = independent.metrics_of(json.loads(json.dumps(record)), file)
    assert found == {"m": [1.0, math.inf], "n": 2, "long": list(range(40))}
