"""How claims are judged: each rule with evidence that a wrong rule would judge otherwise."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from compressible.companion import claims
from compressible.companion.claims import FAIL, INCONCLUSIVE, NOT_TESTED, PASS, WEAK, Claim, ClaimError, Verdict

FIGURE = "kwon2024/05_completion"
INF = math.inf


def claim(judge: str = "at_most", bound: Any = 1.0, metric: str = "m", **more: Any) -> Claim:
    told: Any = {"unit": "seed", "group": "own", "bound_from": "a margin"}
    return Claim(f"{FIGURE}.{metric}", "P2", "a statement", metric, judge, "a source", bound=bound, **told | more)


def positive(**more: Any) -> Claim:
    return claim("greater_than_zero", None, **more)


def evidence(metric: Any, **parameters: Any) -> SimpleNamespace:
    """What `judge` reads of a result, with the metric `m`."""
    arrays = {"m": metric} if isinstance(metric, np.ndarray) else {}
    return SimpleNamespace(arrays=arrays, metrics={} if arrays else {"m": metric}, parameters=parameters)


def judged(tested: Claim, metric: Any, **parameters: Any) -> Verdict:
    return claims.verdict(tested, evidence(metric, **parameters))


def outcome(tested: Claim, metric: Any, **parameters: Any) -> str:
    return judged(tested, metric, **parameters).verdict


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
    found = judged(claim(judge, bound, weak=weak), value)
    assert found.verdict == expected
    assert (found.value, found.low, found.high, found.seeds) == (float(value), None, None, 1)


SURE, WIDE = np.array([0.5, 0.51, 0.49, 0.5, 0.5]), np.array([0.1, 0.9, 0.2, 1.8, 0.9])


@pytest.mark.parametrize(
    ("tested", "values", "expected"),
    [
        (claim(), SURE, PASS),
        (claim(), WIDE, INCONCLUSIVE),  # the mean .78 is inside, the interval is not
        (claim(), WIDE + 0.5, INCONCLUSIVE),  # the mean 1.28 is outside, the interval is not
        (claim(), SURE + 1, FAIL),
        (claim("at_least", 0.4), SURE, PASS),
        (claim("at_least", 0.495), SURE, INCONCLUSIVE),
        (claim("at_least", 0.6), SURE, FAIL),
        (claim("between", [0.4, 0.6]), SURE, PASS),
        (claim("between", [0.495, 0.6]), SURE, INCONCLUSIVE),
        (claim("between", [0.4, 0.495]), SURE, INCONCLUSIVE),
        (claim("between", [0.6, 0.7]), SURE, FAIL),
        (claim("between", [0.3, 0.4]), SURE, FAIL),
        (claim(bound=0.4, weak=0.7), SURE, WEAK),
        (claim(bound=0.4, weak=0.505), SURE, FAIL),  # the mean is inside the weak bound, the interval is not
        (claim(bound=0.495, weak=0.505), SURE, INCONCLUSIVE),
        (positive(), SURE, PASS),
        (positive(), WIDE - 0.5, INCONCLUSIVE),
        (positive(), -SURE, FAIL),
        (positive(), np.zeros(3), FAIL),
        (positive(), np.full(3, 1e-9), PASS),
        (claim(bound=0.1), np.full(3, 0.1), PASS),  # the mean of three times .1 is not .1 in double precision
        (claim(scale="abs", bound=0.6), -SURE, PASS),
        (claim("at_least", 0.4, scale="abs"), -SURE, PASS),
        (claim("at_least", 0.4, scale="abs"), np.array([-0.5, 0.5, -0.5, 0.51]), PASS),  # sizes, not their sum
        (claim(scale="abs"), np.array([0.0, 0.9, 0.0]), INCONCLUSIVE),
        (claim(bound=1e-4, scale="log"), np.array([1e-8, 1e-6, 1e-7]), PASS),
        (claim(bound=1e-4, scale="log"), np.array([1e-8, 1e-3, 1e-8]), INCONCLUSIVE),
        (claim(bound=1e-8, scale="log"), np.array([0.0, 0.0]), PASS),
        (claim(bound=1e-7, scale="log"), 1e-7, PASS),
        (claim("at_least", 0.9, scale="correlation"), np.array([0.97, 0.96, 0.97, 0.98]), PASS),
        (claim("at_least", 0.9, scale="correlation"), np.array([1.0, 1.0, 1.0 + 2e-16]), PASS),
        (claim("at_least", 0.9, scale="correlation"), np.array([1.0, 1.0, 0.9]), INCONCLUSIVE),
        (claim("at_least", 0.0, scale="correlation"), np.array([-0.5, -0.4, -0.45]), FAIL),
        (claim("share", 0.4), np.array([True] * 5), PASS),  # 5 of 5: at least .478
        (claim("share", 0.5), np.array([True] * 5), INCONCLUSIVE),
        (claim("share", 0.9), np.array([True] * 2 + [False] * 8), FAIL),
    ],
)
def test_several_values_are_judged_two_sided(tested: Claim, values: Any, expected: str) -> None:
    assert outcome(tested, values) == expected


@pytest.mark.parametrize(
    ("tested", "values", "expected"),
    [
        (claim(every=True), SURE, PASS),
        (claim(every=True), np.array([0.0, 0.0, 0.99]), PASS),  # though the interval reaches beyond
        (claim(every=True), np.array([0.1] * 9 + [1.01]), FAIL),  # though the interval is inside
        (claim(every=True, weak=1.2), np.array([0.1] * 9 + [1.1]), WEAK),
        (claim(every=True, weak=1.2), np.array([0.1, 1.1, 1.3]), FAIL),
        (claim("true", None), np.array([True, True]), PASS),
        (claim("true", None), np.array([True] * 99 + [False]), FAIL),
    ],
)
def test_what_is_said_of_every_value_is_refuted_by_one(tested: Claim, values: np.ndarray, expected: str) -> None:
    assert outcome(tested, values) == expected


def test_truth_values_show_the_interval_of_clopper_and_pearson() -> None:
    for true, tested in ((3, claim("share", 0.4)), (10, claim("true", None))):
        exact, found = scipy.stats.binomtest(true, 10).proportion_ci(), judged(tested, np.arange(10) < true)
        assert (found.value, found.low, found.high) == pytest.approx((true / 10, exact.low, exact.high))


def test_folds_get_the_corrected_interval() -> None:
    values = np.array([0.9, 0.95, 0.92, 0.91, 0.94])
    assert outcome(claim(bound=0.95), values) == PASS
    overlap: Any = {"unit": "fold", "test_over_train": 0.25}
    found = judged(claim(bound=0.95, **overlap), values)
    assert (found.verdict, found.high) == (INCONCLUSIVE, pytest.approx(0.924 + 2.776445 * 0.0207364 * math.sqrt(0.45)))


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_values_that_are_not_finite_fail_whatever_the_rest(bad: float) -> None:
    for tested in (claim(), claim("at_least", 0.0), positive(), claim(every=True, weak=2.0), claim("between", [0, 1])):
        assert outcome(tested, bad) == FAIL
        found = judged(tested, np.array([0.5, bad, 0.5]))
        assert (found.verdict, found.reason, found.value) == (FAIL, "1 of 3 values not finite", None)


@pytest.mark.parametrize(("scale", "bad"), [("log", -1e-9), ("correlation", 1.01), ("correlation", -1.01)])
def test_values_beyond_the_range_of_their_scale_fail(scale: str, bad: float) -> None:
    tested = claim(bound=0.9, scale=scale)
    assert (outcome(tested, bad), outcome(tested, np.array([0.5, bad]))) == (FAIL, FAIL)


CENSORED = claim(bound=900, censored=True)


@pytest.mark.parametrize(
    ("tested", "values", "expected"),
    [
        (CENSORED, [100, 200, 300, 400, 500, 600, 700, 800, INF], PASS),  # the median is at most 800
        (CENSORED, [100, 200, 300, 400, 500, 600, 700, INF, INF], INCONCLUSIVE),
        (CENSORED, [100, 200, 300, 400, INF], INCONCLUSIVE),  # too few for an interval
        (CENSORED, [INF] * 6, FAIL),
        (CENSORED, [INF] * 5, INCONCLUSIVE),
        (CENSORED, [INF], INCONCLUSIVE),
        (claim(censored=True, scale="log"), [0.0], INCONCLUSIVE),  # the divisor was stopped
        (CENSORED, [math.nan] + [100] * 8, FAIL),  # diverged
        (CENSORED, [-INF] + [100] * 8, FAIL),
        (CENSORED, [880, 890, 885], PASS),  # no value is censored: Student's interval
        (claim("at_least", 90, censored=True), [100, 200, 300, 400, 500, INF], PASS),
        (claim("at_least", 0.5, censored=True, scale="log"), [0.0] + [1.0, 2.0] * 5, PASS),  # one divisor was stopped
        (claim("at_least", 1.5, censored=True, scale="log"), [0.0] + [1.0, 1.1] * 5, FAIL),
        (claim("between", [90, 900], censored=True), [100, 200, 300, 400, 500, INF], INCONCLUSIVE),
        (claim(bound=900), [100, 200, 300, 400, 500, 600, 700, 800, INF], FAIL),
    ],
)
def test_a_run_that_was_stopped_has_a_rank(tested: Claim, values: list[float], expected: str) -> None:
    assert outcome(tested, np.array(values)) == expected


PUBLISHED: Any = {"group": "published"}


@pytest.mark.parametrize(
    ("more", "values", "expected"),
    [
        ({"published_range": [0.3, 0.4]} | PUBLISHED, SURE, WEAK),
        ({"published_range": [0.5, 0.6]} | PUBLISHED, SURE, PASS),
        ({"published_range": [0.45, 0.4951]} | PUBLISHED, SURE, PASS),  # the mean is not in it, the intervals meet
        ({"published_range": [-INF, 0.6]} | PUBLISHED, SURE, PASS),
        ({"published_range": [0.6, INF], "group": "transferred"}, SURE, WEAK),
        ({"published_range": [0.6, 0.7]} | PUBLISHED, 0.5, WEAK),
        ({"published_range": [0.4, 0.6]} | PUBLISHED, 0.5, PASS),
        ({"published_range": [1.4, 1.6]} | PUBLISHED, SURE + 1, FAIL),  # meeting it does not save a bound
        ({"published_range": [0.3, 0.4]} | PUBLISHED, WIDE, INCONCLUSIVE),
    ],
)
def test_a_published_claim_passes_only_at_the_published_size(more: Any, values: Any, expected: str) -> None:
    assert outcome(claim(**more), values) == expected


def together(*tested: Claim, **values: Any) -> list[Verdict]:
    result = SimpleNamespace(parameters={}, metrics={}, arrays={k: np.asarray(v) for k, v in values.items()})
    return claims.judge(FIGURE, result, list(tested))


def gap(p_value: float, count: int = 5) -> np.ndarray:
    """Values whose mean is above zero with this two-sided p value."""
    values = np.arange(count) - (count - 1) / 2
    return values + scipy.stats.t.isf(p_value / 2, count - 1) * values.std(ddof=1) / math.sqrt(count)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (0.02, 0.04, [PASS, PASS]),  # Bonferroni's correction would lose the second one
        (0.03, 0.04, [INCONCLUSIVE, INCONCLUSIVE]),
        (0.001, 0.06, [PASS, INCONCLUSIVE]),
        (0.03, 0.5, [INCONCLUSIVE, INCONCLUSIVE]),
    ],
)
def test_holms_correction_over_a_question(first: float, second: float, expected: list[str]) -> None:
    a, b = (positive(metric=name, question="which") for name in "ab")
    found = together(a, b, a=gap(first), b=gap(second))
    assert [verdict.verdict for verdict in found] == expected
    alone = together(*(positive(metric=name) for name in "ab"), a=gap(first), b=gap(second))
    assert [(v.value, v.low, v.high) for v in found] == [(v.value, v.low, v.high) for v in alone]
    assert alone[0].verdict == PASS
    if expected[0] == INCONCLUSIVE:
        assert found[0].reason == "not after Holm's correction over 2 claims"


def test_holms_correction_takes_what_was_shown() -> None:
    more: Any = {"question": "which"}
    fails = positive(metric="a", **more)
    weak = claim("at_least", 100.0, weak=0.0, metric="b", **more)
    far = claim("at_least", 0.0, metric="c", group="published", published_range=[90, 91], **more)
    for p, expected in ((0.01, [FAIL, WEAK, WEAK]), (0.03, [INCONCLUSIVE] * 3)):
        found = together(fails, weak, far, a=-gap(p), b=gap(p), c=gap(p))
        assert [verdict.verdict for verdict in found] == expected


def test_values_at_an_end_of_a_bound_are_no_evidence_of_lying_outside() -> None:
    more: Any = {"question": "which", "scale": "log", "censored": True}
    tested = claim("at_least", 1.0, metric="a", **more)
    others = [positive(metric=name, question="which") for name in "bc"]
    ratios = [0.0, 0.6, 0.5, 0.7, 0.4, 0.8, 0.9, 0.3, 0.2, 1.0]  # the last pair took the same steps
    p_value = scipy.stats.binomtest(9, 10).pvalue
    assert 0.05 / 3 < p_value < 0.05
    assert outcome(claim("at_least", 1.0, scale="log", censored=True), np.array(ratios)) == FAIL
    found = together(tested, *others, a=ratios, b=gap(0.5), c=gap(0.6))
    assert found[0].verdict == INCONCLUSIVE
    assert together(tested, *others, a=[*ratios[:-1], 0.95], b=gap(0.5), c=gap(0.6))[0].verdict == FAIL


def test_what_has_no_p_value_takes_no_part_in_a_correction() -> None:
    more: Any = {"question": "which"}
    rest = [
        claim(metric="single", **more),
        claim("true", None, metric="all", **more),
        claim(metric="each", every=True, **more),
        claim(metric="lost", **more),
        claim(metric="few", seeds=9, **more),
        positive(metric="other", question="another"),
    ]
    values = {"single": [0.5], "all": [1, 1], "each": SURE, "lost": [math.nan, 1], "few": SURE, "other": gap(0.5)}
    found = together(positive(metric="a", **more), *rest, a=gap(0.04), **values)
    assert [v.verdict for v in found] == [PASS, PASS, PASS, PASS, FAIL, NOT_TESTED, INCONCLUSIVE]


def test_a_bound_of_two_ends_takes_the_worse_one_for_inside_and_the_better_one_for_outside() -> None:
    more: Any = {"question": "which"}
    values = gap(0.03)  # above 0 with p = .03, below 100 with much less
    for bound, outside in (([0, 100], False), ([-100, 0], True)):
        tested = claim("between", bound, metric="a", **more)
        found = together(tested, positive(metric="b", **more), a=values, b=gap(0.001))
        assert found[0].verdict == (FAIL if outside else PASS)
        found = together(tested, positive(metric="b", **more), a=values, b=gap(0.9))
        assert found[0].verdict == INCONCLUSIVE


def wrong_verdicts(tested: list[Claim], truth: float, wrong: str, count: int = 5, shared: float = 0.0) -> float:
    """Share of 1500 draws in which any verdict is `wrong`, where the true mean of every metric is `truth`."""
    generator, wrongly = np.random.default_rng(0), 0
    for _ in range(1500):
        common = generator.standard_normal(count)
        values = {
            c.metric: truth + math.sqrt(shared) * common + math.sqrt(1 - shared) * generator.standard_normal(count)
            for c in tested
        }
        wrongly += any(verdict.verdict == wrong for verdict in together(*tested, **values))
    return wrongly / 1500


def test_few_claims_pass_or_fail_wrongly() -> None:
    assert wrong_verdicts([positive(metric="a")], 0.0, PASS) == pytest.approx(0.025, abs=0.012)
    assert wrong_verdicts([claim("at_least", 0.0, metric="a")], 0.0, FAIL) == pytest.approx(0.025, abs=0.012)
    assert wrong_verdicts([claim("between", [-4, 4], metric="a")], 4.0, PASS) <= 0.037
    assert wrong_verdicts([claim("between", [0, 4], metric="a")], 4.0, FAIL) <= 0.037
    assert wrong_verdicts([claim("between", [-1e-9, 1e-9], metric="a")], 0.0, FAIL) <= 0.062


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_few_questions_have_a_wrong_answer(shared: float) -> None:
    alone, asked = ([positive(metric=f"m{i}", question=name) for i in range(6)] for name in ("", "which"))
    assert wrong_verdicts(alone, 0.0, PASS, shared=shared) > 0.07
    assert wrong_verdicts(asked, 0.0, PASS, shared=shared) <= 0.05


@pytest.mark.parametrize(
    ("tested", "metric", "parameters", "reason"),
    [
        (claim(seeds=5), np.array([0.1, 0.2]), {}, "2 of 5 seeds"),
        (claim(seeds=2, unit="timing"), 0.1, {}, "1 of 2 timings"),
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
    found = judged(tested, metric, **parameters)
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


@pytest.mark.parametrize("metric", ["text", np.ones((2, 2)), np.array(["a"]), [0.5, None]])
def test_a_metric_that_is_no_number_over_seeds_is_an_error(metric: Any) -> None:
    with pytest.raises(ClaimError, match="expected numbers over seeds"):
        judged(claim(), metric)


@pytest.mark.parametrize("judge", ["true", "share"])
def test_truth_values_are_zero_or_one(judge: str) -> None:
    tested = claim(judge, 0.5 if judge == "share" else None)
    with pytest.raises(ClaimError, match="expected truth values over seeds"):
        judged(tested, np.array([0.9, 1.0]))
    assert outcome(tested, np.array([1.0] * 9)) == PASS


def test_judge_takes_the_claims_of_one_figure() -> None:
    other = Claim("yaras2024/02_depth.x", "P1", "s", "m", "at_most", "here", "seed", "own", "a margin", bound=1.0)
    assert [v.id for v in claims.judge(FIGURE, evidence(0.1), [claim(), other])] == [f"{FIGURE}.m"]


def test_the_digest_holds_what_moves_a_verdict_and_nothing_else() -> None:
    base: Any = {"group": "published", "published_range": [0, 1]}
    same = [{"unit": "run"}, {"after_looking": True}, {"bound_from": "the theory"}, {"published": "1"}, {"preset": "x"}]
    assert {claim(**base | more).rule() for more in same} == {claim(**base).rule()}
    moved: list[dict[str, Any]] = [
        {"bound": 2.0}, {"weak": 2.0}, {"scale": "log"}, {"every": True}, {"censored": True}, {"seeds": 2},
        {"question": "which"}, {"published_range": [0, 2]}, {"unit": "fold", "test_over_train": 0.25},
        {"unit": "fold", "test_over_train": 0.5}, {"requires": {"n": 1}}, {"metric": "n"},
    ]  # fmt: skip
    assert len({claim(**base | more).rule() for more in [{}, *moved]}) == len(moved) + 1


def test_a_verdict_of_a_question_tells_which_claims_shared_the_correction() -> None:
    a, b, c = (positive(metric=name, question="which") for name in "abc")
    values = {name: gap(0.01) for name in "abc"}
    two, three = together(a, b, **values)[0].rule, together(a, b, c, **values)[0].rule
    assert len({two, three, a.rule()}) == 3
