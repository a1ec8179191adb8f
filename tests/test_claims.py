"""The verdict rules on synthetic evidence, the claims file, and the table over records."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from compressible.__main__ import main
from compressible.companion import claims, notebooks
from compressible.companion.claims import FAIL, INCONCLUSIVE, NOT_TESTED, PASS, WEAK, Claim, ClaimError

FIGURE = "kwon2024/05_completion"


def claim(judge: str = "at_most", bound: Any = 1.0, **more: Any) -> Claim:
    return Claim(f"{FIGURE}.x", "P2", "a statement", "m", judge, "a source", bound=bound, **more)


def evidence(metric: Any, **parameters: Any) -> SimpleNamespace:
    """What `judge` reads of a result, with the metric `m`."""
    arrays = {"m": metric} if isinstance(metric, np.ndarray) else {}
    return SimpleNamespace(arrays=arrays, metrics={} if arrays else {"m": metric}, parameters=parameters)


def outcome(tested: Claim, metric: Any, **parameters: Any) -> str:
    return claims.verdict(tested, evidence(metric, **parameters)).verdict


@pytest.mark.parametrize(
    ("judge", "bound", "weak", "value", "expected"),
    [
        ("at_most", 1.0, None, 1.0, PASS), ("at_most", 1.0, None, 1.01, FAIL),
        ("at_most", 1.0, 1.2, 1.1, WEAK), ("at_most", 1.0, 1.2, 1.3, FAIL),
        ("at_least", 2.0, 1.0, 2.5, PASS), ("at_least", 2.0, 1.0, 1.5, WEAK),
        ("at_least", 2.0, 1.0, 0.5, FAIL), ("between", [1, 2], None, 1.5, PASS),
        ("between", [1, 2], None, 2.5, FAIL), ("between", [1, 2], [0, 3], 2.5, WEAK),
        ("between", [1, 2], [0, 3], -0.5, FAIL),
        ("greater_than_zero", None, None, 1e-9, PASS), ("greater_than_zero", None, None, 0.0, FAIL),
        ("true", None, None, True, PASS), ("true", None, None, False, FAIL),
    ],
)  # fmt: skip
def test_one_value(judge: str, bound: Any, weak: Any, value: Any, expected: str) -> None:
    found = claims.verdict(claim(judge, bound, weak=weak), evidence(value))
    assert found.verdict == expected
    assert (found.value, found.low, found.high, found.seeds) == (float(value), None, None, 1)


SURE, WIDE = np.array([0.5, 0.51, 0.49, 0.5, 0.5]), np.array([0.1, 0.9, 0.2, 1.8, 0.9])


@pytest.mark.parametrize(
    ("tested", "values", "expected"),
    [
        (claim(), SURE, PASS),
        (claim(), WIDE, WEAK),  # the mean .78 is inside, the interval is not
        (claim(), WIDE + 1, FAIL),
        (claim(weak=2.0), WIDE + 1, WEAK),
        (claim(every=True), SURE, PASS),
        (claim(every=True), np.array([0.9, 0.9, 1.01]), WEAK),
        (claim(every=True), np.array([0.9, 1.2, 1.3]), FAIL),
        (claim(every=True), np.array([0.0, 0.0, 0.99]), PASS),  # though the interval reaches beyond
        (claim(), np.array([0.0, 0.0, 0.99]), WEAK),
        (claim("greater_than_zero", None), SURE, PASS),
        (claim("greater_than_zero", None), WIDE - 0.5, WEAK),
        (claim("greater_than_zero", None), -WIDE, FAIL),
        (claim("between", [0.4, 0.6]), SURE, PASS),
        (claim("between", [0.495, 0.6]), SURE, WEAK),
        (claim("at_least", 0.4), SURE, PASS),
        (claim("true", None), np.array([True, True]), PASS),
        (claim("true", None), np.array([True, True, False]), WEAK),
        (claim("true", None), np.array([True, False]), FAIL),
        (claim(scale="abs", bound=0.6), -SURE, PASS),
        (claim("at_least", 0.4, scale="abs"), -SURE, PASS),
    ],
)
def test_several_seeds(tested: Claim, values: np.ndarray, expected: str) -> None:
    assert outcome(tested, values) == expected


UNIT: Any = {"unit": "seed"}


@pytest.mark.parametrize(
    ("tested", "values", "expected"),
    [
        (claim(**UNIT), SURE, PASS),
        (claim(**UNIT), WIDE, INCONCLUSIVE),  # the mean .78 is inside, the interval is not
        (claim(**UNIT), WIDE + 0.5, INCONCLUSIVE),  # the mean 1.28 is outside, the interval is not
        (claim(**UNIT), SURE + 1, FAIL),
        (claim(**UNIT), 1.5, FAIL),
        (claim(**UNIT), 0.5, PASS),
        (claim("between", [0.4, 0.6], **UNIT), SURE, PASS),
        (claim("between", [0.495, 0.6], **UNIT), SURE, INCONCLUSIVE),
        (claim("between", [0.6, 0.7], **UNIT), SURE, FAIL),
        (claim("greater_than_zero", None, **UNIT), WIDE - 0.5, INCONCLUSIVE),
        (claim("greater_than_zero", None, **UNIT), -SURE, FAIL),
        (claim("greater_than_zero", None, **UNIT), np.zeros(3), FAIL),
        (claim(scale="abs", **UNIT), np.array([0.0, 0.9, 0.0]), INCONCLUSIVE),
        (claim(bound=1.5, scale="abs", **UNIT), np.array([-0.1, 0.1, 0.2]), PASS),
        (claim(every=True, **UNIT), np.array([0.5, 1.1, 0.5]), FAIL),
        (claim("true", None, **UNIT), np.array([True] * 9 + [False]), FAIL),
        (claim("share", 0.4, **UNIT), np.array([True] * 5), PASS),  # 5 of 5: at least .478
        (claim("share", 0.5, **UNIT), np.array([True] * 5), INCONCLUSIVE),
        (claim("share", 0.9, **UNIT), np.array([True] * 2 + [False] * 8), FAIL),
        (claim(**UNIT), np.array([0.5, np.nan]), FAIL),
        (claim(bound=0.4, weak=0.7, **UNIT), SURE, WEAK),
        (claim(bound=0.4, weak=0.505, **UNIT), SURE, FAIL),
    ],
)
def test_a_claim_with_a_unit_is_judged_two_sided(tested: Claim, values: Any, expected: str) -> None:
    assert outcome(tested, values) == expected


def test_shares_have_the_interval_of_clopper_and_pearson() -> None:
    for true, count in ((0, 10), (3, 10), (10, 10)):
        exact = scipy.stats.binomtest(true, count).proportion_ci()
        found = claims.verdict(claim("share", 0.4, **UNIT), evidence(np.arange(count) < true))
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


def test_a_unit_does_not_change_the_digests_of_claims_without_one() -> None:
    assert claim().rule() == claim(group="own").rule() != claim(**UNIT).rule()


def test_the_interval_is_student_t() -> None:
    found = claims.verdict(claim(), evidence(np.array([1.0, 2.0, 3.0])))
    half = 4.302652729911275 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - half, 2 + half))


def test_log_scale_takes_the_geometric_mean() -> None:
    values = np.array([1e-8, 1e-6, 1e-7])
    found = claims.verdict(claim(bound=1e-4, scale="log"), evidence(values))
    assert (found.verdict, found.value) == (PASS, pytest.approx(1e-7))
    assert found.low < 1e-8 < 1e-6 < found.high < 1e-4
    assert outcome(claim(bound=1e-8, scale="log"), np.array([0.0, 0.0])) == PASS
    assert outcome(claim(bound=1e-8, scale="log"), np.array([1e-9, -1e-9])) == FAIL


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_fail_whatever_the_rest(bad: float) -> None:
    for tested in (claim(), claim("at_least", 0.0), claim("greater_than_zero", None), claim(every=True)):
        assert outcome(tested, bad) == FAIL
        found = claims.verdict(tested, evidence(np.array([0.5, bad, 0.5])))
        assert (found.verdict, found.reason, found.value) == (FAIL, "1 of 3 values not finite", None)


@pytest.mark.parametrize(
    ("tested", "metric", "parameters", "reason"),
    [
        (claim(seeds=5), np.array([0.1, 0.2]), {}, "2 of 5 seeds"),
        (claim(seeds=2), 0.1, {}, "1 of 2 seeds"),
        (claim(), np.array([]), {}, "0 of 1 seeds"),
        (claim(requires={"dimension": 100}), 0.1, {"dimension": 30}, "dimension is 30, needs at least 100"),
        (claim(requires={"widths": 10}), 0.1, {"widths": [1, 2, 3]}, "widths is 3, needs at least 10"),
        (claim(requires={"split": "u1"}), 0.1, {"split": "seed0"}, "split is 'seed0', needs 'u1'"),
        (claim(requires={"seeds": 5}), 0.1, {}, "no parameter 'seeds'"),
        (
            claim(requires={"tolerance": {"at_most": 1e-10}}), 0.1, {"tolerance": 1e-6},
            "tolerance is 1e-06, needs at most 1e-10",
        ),
        (claim(requires={"steps": {"exactly": 500}}), 0.1, {"steps": 40000}, "steps is 40000, needs 500"),
        (claim(requires={"rate": {"exactly": 1e-4}}), 0.1, {"rate": 1e-9}, "rate is 1e-09, needs 0.0001"),
        (claim(requires={"sizes": [16, 64]}), 0.1, {"sizes": [2, 64]}, "sizes is [2, 64], needs [16, 64]"),
        (claim(requires={"sizes": [16, 64]}), 0.1, {"sizes": [16]}, "sizes is [16], needs [16, 64]"),
        (claim(requires={"sizes": [16, 64]}), 0.1, {"sizes": 16}, "sizes is 16, needs [16, 64]"),
        (claim(requires={"names": ["a"]}), 0.1, {"names": ["b"]}, "names is ['b'], needs ['a']"),
    ],
)  # fmt: skip
def test_too_small_is_not_tested(tested: Claim, metric: Any, parameters: dict, reason: str) -> None:
    found = claims.verdict(tested, evidence(metric, **parameters))
    assert (found.verdict, found.reason, found.value) == (NOT_TESTED, reason, None)


def test_requirements_that_are_met() -> None:
    needs = {"dimension": 100, "widths": 2, "split": "u1", "tolerance": {"at_most": 1e-10}, "rates": [0.3, 1]}
    needs |= {"rate": {"exactly": 0.1 + 0.2}, "names": ["a", "b"]}
    given = {"dimension": 100, "widths": [1, 2], "split": "u1", "tolerance": 1e-10, "rates": [0.1 + 0.2, 1.0]}
    given |= {"rate": 0.3, "names": ["a", "b"]}
    assert outcome(claim(requires=needs), 0.1, **given) == PASS


def test_a_missing_metric_is_not_tested() -> None:
    found = claims.verdict(claim(), SimpleNamespace(arrays={}, metrics={"n": 1.0}, parameters={}))
    assert (found.verdict, found.reason) == (NOT_TESTED, "no metric 'm'")


@pytest.mark.parametrize("metric", ["text", np.ones((2, 2)), np.array(["a"])])
def test_a_metric_that_is_no_number_over_seeds_is_an_error(metric: Any) -> None:
    with pytest.raises(ClaimError, match="expected numbers over seeds"):
        claims.verdict(claim(), evidence(metric))


def test_judge_takes_the_claims_of_one_figure() -> None:
    other = Claim("yaras2024/02_depth.x", "P1", "s", "m", "at_most", "here", bound=1.0)
    assert [v.id for v in claims.judge(FIGURE, evidence(0.1), [claim(), other])] == [f"{FIGURE}.x"]


ENTRY = f"""
[[claim]]
id = "{FIGURE}.x"
paper = "P2"
statement = "a statement"
metric = "m"
judge = "at_most"
bound = 1.0
source = "a source"
"""


def test_the_repositorys_claims_are_valid() -> None:
    assert all(isinstance(entry, Claim) for entry in claims.load_claims())


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "claims.toml"
    path.write_text(ENTRY + 'weak = 1.5\npublished = "0.9"\nseeds = 5\nrequires = { widths = 10 }\n')
    (entry,) = claims.load_claims(path)
    assert (entry.weak, entry.seeds, entry.requires, entry.figure) == (1.5, 5, {"widths": 10}, FIGURE)
    assert entry.bound_text() == "<= 1 (weak: <= 1.5)"
    path.write_text("# none\n")
    assert claims.load_claims(path) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("metric", "metrik", "missing 'metric'"),
        ("metric", "metrik", "unknown key 'metrik'"),
        ('source = "a source"', "", "missing 'source'"),
        ('source = "a source"', 'source = ""', "source: got '', expected to have at least 1 character"),
        ('"at_most"', '"below"', "judge: got 'below', expected 'at_most', 'at_least'"),
        ('"P2"', '"P9"', "paper: got 'P9', expected 'P1', 'P2', 'P3' or 'beyond'"),
        ("bound = 1.0", "", "bound: got None, expected 1 number"),
        ("bound = 1.0", "bound = nan", "bound: got nan"),
        ("bound = 1.0", "bound = true", "bound: got True"),
        ("bound = 1.0", "bound = [0, 1]", r"bound: got \[0, 1\]"),
        ("bound = 1.0", "bound = 1.0\nweak = 0.5", "weak: got 0.5, expected a bound looser than 1.0"),
        ('"at_most"\nbound = 1.0', '"between"\nbound = [2, 1]', "the lower first"),
        ('"at_most"\nbound = 1.0', '"between"\nbound = [1, 2]\nweak = [1.5, 3]', "looser"),
        ('"at_most"', '"true"', "bound: got 1.0, expected no number"),
        ("bound = 1.0", "bound = 1.0\nseeds = 0", "seeds: got 0, expected greater than 0"),
        ("bound = 1.0", 'bound = 1.0\nscale = "cube"', "scale: got 'cube', expected 'linear', 'abs', 'log' or 'correlation'"),
        ("bound = 1.0", 'bound = -1.0\nscale = "log"', "log needs bounds above zero"),
        ("bound = 1.0", "bound = 1.0\nrequires = 3", "requires"),
        (
            "bound = 1.0",
            "bound = 1.0\nrequires = { rate = 1e-4 }",
            "rate is 0.0001, expected an integer",
        ),
        ("bound = 1.0", "bound = 1.0\nrequires = { rate = { equals = 1 } }", "rate is {'equals': 1}, expected"),
        ("bound = 1.0", "bound = 1.0\nrequires = { n = { exactly = 1, at_most = 2 } }", "requires: got .*, n is"),
        ("bound = 1.0", "bound = 1.0\npreset = 3", "preset: got 3, expected a valid string"),
        (f'"{FIGURE}.x"', '"completion"', "id: got 'completion', expected to match pattern"),
        ("[[claim]]", "[[claims]]", "unknown table 'claims'"),
        ("bound = 1.0", "bound = ", "claims.toml: "),
    ],
)
def test_mistakes_in_the_file_are_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "claims.toml"
    path.write_text(ENTRY.replace(old, new))
    with pytest.raises(ClaimError, match=message):
        claims.load_claims(path)


def test_an_id_may_not_come_twice(tmp_path: Path) -> None:
    path = tmp_path / "claims.toml"
    path.write_text(ENTRY + ENTRY)
    with pytest.raises(ClaimError, match=f"{FIGURE}.x: this id is there twice"):
        claims.load_claims(path)


def write_record(root: Path, preset: str, tested: Claim, metric: Any) -> None:
    verdict = claims.verdict(tested, evidence(metric))
    path = root / preset / f"{tested.figure}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"id": tested.figure, "preset": preset, "claims": [asdict(verdict)]}))


def test_the_table_takes_the_record_that_a_claim_names(tmp_path: Path) -> None:
    for preset, value in (("paper", 2.0), ("minilm", SURE), ("another", 3.0)):
        write_record(tmp_path, preset, claim(), value)
    small = claim(preset="minilm")
    assert small.rule() == claim().rule()
    for chosen in (None, "own", "minilm"):
        assert "ours: 0.5 [0.491, 0.509] (minilm, 5 seeds)" in claims.table(tmp_path, preset=chosen, claims=[small])
    (tmp_path / "minilm" / f"{FIGURE}.json").unlink()
    assert "(another)" in claims.table(tmp_path, claims=[small])
    own = claims.table(tmp_path, preset="own", claims=[small])
    assert f"ours: no record: `make figure ID={FIGURE} PRESET=minilm`;" in own and "1 NOT TESTED" in own


def test_the_command_of_a_claim_without_record_asks_for_the_gpu_that_it_needs(tmp_path: Path) -> None:
    tested = Claim("yaras2024/04_compressed_completion.x", "P1", "s", "m", "at_most", "here", bound=1.0)
    command = "`make figure ID=yaras2024/04_compressed_completion PRESET=paper GPUS=1`"
    assert command in claims.table(tmp_path, claims=[tested])


def test_the_table_prefers_the_paper_preset(tmp_path: Path) -> None:
    for preset, value in (("quick", 2.0), ("paper", SURE), ("another", 3.0)):
        write_record(tmp_path, preset, claim(published="0.7"), value)
    text = claims.table(tmp_path, claims=[claim(published="0.7")])
    assert "PASS         a statement" in text
    assert "ours: 0.5 [0.491, 0.509] (paper, 5 seeds); published: 0.7" in text
    assert "1 claims: 1 PASS, 0 WEAK, 0 FAIL, 0 INCONCLUSIVE, 0 NOT TESTED." in text
    assert "FAIL         a statement" in claims.table(tmp_path, preset="quick", claims=[claim()])


def test_claims_without_a_record_or_changed_since_are_not_tested(tmp_path: Path) -> None:
    assert "NOT TESTED   a statement" in claims.table(tmp_path, claims=[claim()])
    write_record(tmp_path, "quick", claim(), 0.5)
    assert "PASS         a statement" in claims.table(tmp_path, claims=[claim()])
    for changed in (claim(bound=0.9), claim(seeds=5), claim(requires={"dimension": 100})):
        assert "ours: no record since the claim changed: `make figure ID=" in claims.table(tmp_path, claims=[changed])


def test_a_claim_that_changed_is_judged_again_on_what_the_record_holds(tmp_path: Path) -> None:
    write_record(tmp_path, "paper", claim(), SURE)
    path = tmp_path / "paper" / f"{FIGURE}.json"
    kept = {"parameters": {"dimension": 30, "sizes": [1]}, "metrics": {"m": SURE.tolist(), "lost": [0.5, None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | kept))
    for changed, verdict in (
        (claim(bound=0.4), FAIL),
        (claim(seeds=5, requires={"sizes": [1]}), PASS),
        (claim(requires={"dimension": 100}), NOT_TESTED),
        (claim(seeds=6), NOT_TESTED),
    ):
        assert f"1 {verdict}" in claims.table(tmp_path, claims=[changed])
    lost = Claim(f"{FIGURE}.y", "P2", "added later, a seed diverged", "lost", "at_most", "here", bound=1.0)
    assert "1 FAIL" in claims.table(tmp_path, claims=[lost])


def test_files_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    write_record(tmp_path, "quick", claim(), 0.5)
    for name, text in (("half", '{"id": '), ("list", "[1]"), ("other", '{"id": "x"}')):
        (tmp_path / "quick" / "kwon2024" / f"{name}.json").write_text(text)
    assert "1 PASS" in claims.table(tmp_path, claims=[claim()])


def test_markdown_groups_by_paper_and_escapes(tmp_path: Path) -> None:
    first = Claim("yaras2024/03_svd.a", "P1", "|a| < b", "m", "at_most", "here", bound=1.0)
    text = claims.table(tmp_path, format="markdown", claims=[claim(), first])
    assert text.index("**P1") < text.index("**P2")
    unrecorded = "no record: `make figure ID=yaras2024/03_svd PRESET=paper`"
    assert f"| \\|a\\| < b <sub>yaras2024/03_svd.a</sub> |  | {unrecorded} | NOT TESTED |" in text
    with pytest.raises(ValueError, match="format: got 'html'"):
        claims.table(tmp_path, format="html", claims=[])


def test_the_readme_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- claims:start -->\nold\n<!-- claims:end -->\nbelow\n")
    for _ in range(2):
        claims.readme_block("new\n", readme)
        assert readme.read_text() == "above\n<!-- claims:start -->\nnew\n<!-- claims:end -->\nbelow\n"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="expected the marks"):
        claims.readme_block("new", readme)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one claim and a README, as the working directory."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "compressible-dynamics"\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "claims.toml").write_text(ENTRY)
    (tmp_path / "README.md").write_text("<!-- claims:start --><!-- claims:end -->")
    monkeypatch.delenv("COMPRESSIBLE_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_prints_and_writes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(project / "figures", "quick", claim(), 0.5)
    assert main(["claims"]) == 0
    assert "PASS         a statement" in capsys.readouterr().out
    assert main(["claims", "--preset", "paper", "--format", "markdown"]) == 0
    assert "PRESET=paper` | NOT TESTED |" in capsys.readouterr().out
    assert main(["claims", "--preset", "papr"]) == 2
    assert "got 'papr', expected 'own' or a preset; the closest is 'paper'" in capsys.readouterr().err
    assert main(["claims", "--write-readme"]) == 0
    assert "| a statement <sub>" in (project / "README.md").read_text()


DESCRIBED = {
    "yaras2024/01_finetuning_subspaces": "matrices depth init_scale learning_rate decay_ratio batch_size steps",
    "yaras2024/08_few_shot": "matrices sample_sizes adapter_rank init_scale learning_rate batch_size steps",
    "beyond/08_tutorial": "few_rows deep_rates lora_rates batch_size steps length",
}


@pytest.mark.parametrize("tested", [c for c in claims.load_claims() if c.figure in DESCRIBED and c.requires])
def test_a_verdict_on_fine_tuning_needs_the_run_that_its_preset_describes(tested: Claim) -> None:
    own = notebooks.presets(tested.figure)[tested.preset].parameters
    values = notebooks.defaults(notebooks.notebook_path(tested.figure)) | own
    result = SimpleNamespace(parameters=values, arrays={tested.metric: np.ones(20)}, metrics={})
    assert claims.verdict(tested, result).verdict != NOT_TESTED
    for name in ["validation_rows", *DESCRIBED[tested.figure].split()]:
        other = [*values[name][:-1], 7] if isinstance(values[name], list) else 2 * values[name] + 1
        result.parameters = values | {name: other}
        assert claims.verdict(tested, result).verdict == NOT_TESTED, name
