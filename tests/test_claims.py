"""The claims file, and the table over records."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compressible.companion import claims, notebooks
from compressible.companion.claims import FAIL, NOT_TESTED, PASS, Claim, ClaimError

FIGURE = "kwon2024/05_completion"


TOLD: Any = {"unit": "seed", "group": "own", "bound_from": "a margin"}


def claim(judge: str = "at_most", bound: Any = 1.0, **more: Any) -> Claim:
    return Claim(f"{FIGURE}.x", "P2", "a statement", "m", judge, "a source", bound=bound, **TOLD | more)


def evidence(metric: Any, **parameters: Any) -> SimpleNamespace:
    """What `judge` reads of a result, with the metric `m`."""
    arrays = {"m": metric} if isinstance(metric, np.ndarray) else {}
    return SimpleNamespace(arrays=arrays, metrics={} if arrays else {"m": metric}, parameters=parameters)


SURE = np.array([0.5, 0.51, 0.49, 0.5, 0.5])


ENTRY = f"""
[[claim]]
id = "{FIGURE}.x"
paper = "P2"
statement = "a statement"
metric = "m"
judge = "at_most"
bound = 1.0
unit = "seed"
group = "published"
bound_from = "a margin"
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
        ('unit = "seed"', "", "missing 'unit'"),
        ('group = "published"', "", "missing 'group'"),
        ('bound_from = "a margin"', "", "missing 'bound_from'"),
        ('"a margin"', '""', "bound_from: got '', expected to have at least 1 character"),
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
        (
            "bound = 1.0",
            'bound = 1.0\nscale = "cube"',
            "scale: got 'cube', expected 'linear', 'abs', 'log' or 'correlation'",
        ),
        ("bound = 1.0", 'bound = -1.0\nscale = "log"', r"scale log: got \[-1.0\], expected bounds above zero"),
        ("bound = 1.0", 'bound = -1.0\nscale = "abs"', "expected bounds of at least zero"),
        ("bound = 1.0", 'bound = 1.1\nscale = "correlation"', "expected bounds from -1 to 1"),
        ('"at_most"\nbound = 1.0', '"share"\nbound = 1.5', "expected a bound above 0, at most 1"),
        ('"at_most"\nbound = 1.0', '"greater_than_zero"\nscale = "abs"', "got no bound, expected bounds of at least"),
        ('"at_most"\nbound = 1.0', '"true"\nevery = true', "true is of truth values, expected no scale and no 'every'"),
        ('"seed"', '"fold"', "test_over_train: got None, expected rows judged over rows trained on"),
        ("bound = 1.0", "bound = 1.0\ntest_over_train = 0.25", "got 0.25, expected none, as a seed shares no rows"),
        ("bound = 1.0", "bound = 1.0\ntest_over_train = 0.0", "test_over_train: got 0.0, expected greater than 0"),
        (
            '"at_most"\nbound = 1.0\nunit = "seed"',
            '"share"\nbound = 0.5\nunit = "fold"\ntest_over_train = 0.25',
            "unit: got 'fold', expected values that share no rows",
        ),
        ("bound = 1.0", "bound = 1.0\ncensored = true\nevery = true", "censored: got true, expected it for counts"),
        (
            "bound = 1.0",
            "bound = 1.0\npublished_range = [2, 1]",
            r"published_range: got \[2, 1\], expected two numbers",
        ),
        ("bound = 1.0", "bound = 1.0\npublished_range = [1.0]", "expected two numbers, the lower first"),
        ("bound = 1.0", "bound = 1.0\npublished_range = [nan, 1]", "expected two numbers, the lower first"),
        ('"published"', '"own"\npublished_range = [0, 1]', "with group 'own', which is not held against any"),
        ('"seed"', '"seeds"', "unit: got 'seeds', expected"),
        ('"published"', '"theirs"', "group: got 'theirs', expected"),
        (
            "bound = 1.0",
            'bound = 1.0\nquestion = "Which one?"',
            "got 'Which one.', expected to match pattern",
        ),
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


def test_a_question_stays_within_one_record(tmp_path: Path) -> None:
    path, asked = tmp_path / "claims.toml", 'question = "which"\n'
    path.write_text(ENTRY + asked + ENTRY.replace(".x", ".y") + asked)
    assert [claim.question for claim in claims.load_claims(path)] == ["which", "which"]
    for other in (ENTRY.replace(FIGURE, "kwon2024/06_sensing"), ENTRY.replace(".x", ".y") + 'preset = "large"\n'):
        path.write_text(ENTRY + asked + other + asked)
        with pytest.raises(
            ClaimError, match=f"question 'which': got {FIGURE} at .*, kwon2024/.*, expected one of them"
        ):
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
    tested = Claim("yaras2024/04_compressed_completion.x", "P1", "s", "m", "at_most", "here", bound=1.0, **TOLD)
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
    lost = Claim(f"{FIGURE}.y", "P2", "added later, a seed diverged", "lost", "at_most", "here", bound=1.0, **TOLD)
    assert "1 FAIL" in claims.table(tmp_path, claims=[lost])


def test_files_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    write_record(tmp_path, "quick", claim(), 0.5)
    for name, text in (("half", '{"id": '), ("list", "[1]"), ("other", '{"id": "x"}')):
        (tmp_path / "quick" / "kwon2024" / f"{name}.json").write_text(text)
    assert "1 PASS" in claims.table(tmp_path, claims=[claim()])


DESCRIBED = {
    "yaras2024/01_finetuning_subspaces": "matrices depth init_scale learning_rate decay_ratio batch_size steps",
    "yaras2024/08_few_shot": "matrices sample_sizes adapter_rank init_scale learning_rate batch_size steps",
    "yaras2024/table1_glue": (
        "tasks step_counts matrices few_rows adapter_rank init_scale learning_rate batch_size max_length"
    ),
    "yaras2024/07_deep_lora_compression": "matrices few_rows adapter_rank init_scale learning_rate batch_size",
    "yaras2024/09_update_ranks": "matrices few_rows adapter_rank init_scale learning_rate batch_size steps",
    "yaras2024/10_rank_robustness": "matrices few_rows ranks init_scale learning_rate batch_size steps",
    "beyond/08_tutorial": "few_rows learning_rates tuning_rows tuning_seeds tuning_steps batch_size steps length",
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
