"""What `run --check` accepts and refuses over all notebooks: combinations by their rules, and anything by one line."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from compressible.companion import notebooks, rules
from compressible.companion.command_line import main

IDS = notebooks.ids()


@pytest.mark.parametrize(
    ("id", "values", "told"),
    [
        ("kwon2024/05_completion", ["rank", "60"], "rank = 60, dimension = 100, expected 2 * rank <= dimension"),
        ("kwon2024/05_completion", ["dimension", "20", "rank", "2", "observed", "0.001"], "at least one entry"),
        ("kwon2024/05_completion", ["seed", "18446744073709551616"], "seed: got 18446744073709551616"),
        ("kwon2024/06_sensing", ["measurements", "1"], "expected measurements >= dimension * rank"),
        ("kwon2024/02_principal_components", ["steps", "3000"], "expected steps * step_size >= 12 * dimension ** 2"),
        ("kwon2024/04_factorization", ["steps", "6000"], "expected steps * step_size >= 10 * dimension ** 2"),
        ("kwon2024/04_factorization", ["step_size", "1e300"], "step_size: got 1e+300"),
        ("kwon2024/05_completion", ["steps", "0"], "expected at most steps = 0"),
        ("kwon2024/05_completion", ["outer_ratios", "[0.0, 1.0]"], "expected min(outer_ratios) > 0"),
        ("yaras2024/04_compressed_completion", ["tolerance", "1.0"], "expected tolerance <= 1e-4"),
        ("yaras2024/06_compressed_factorization", ["init_scale", "1e-300"], "init_scale: got 1e-300"),
        ("balzano2025/06_dropout_is_low_rank", ["steps", "0"], "steps = 0, expected steps >= 1"),
        ("kwon2024/07_step_ratio", ["steps", "300"], "expected steps >= 5_000"),
        ("kwon2024/07_step_ratio", ["outer_ratios", "[2.0]"], "expected 1.0 in outer_ratios"),
        ("kwon2024/08_movielens", ["users", "5000"], "users = 5000, expected users <= 943"),
        ("beyond/02_rank_bound", ["outer_ratios", "[1.0, 1.0]"], "expected each value once"),
        ("beyond/03_noise", ["seed", "18446744073709551615"], "seed: got 18446744073709551615"),
        ("kwon2024/11_vit_cifar", ["heads", "3"], "expected width % heads == 0"),
        ("yaras2024/08_few_shot", ["steps", "5"], "expected max(evaluate_at) == steps"),
        ("balzano2025/07_masked_training", ["mask_rates", "[0.5, 0.0]"], "expected mask_rates[0] == 0"),
    ],
)
def test_what_a_notebook_would_refuse_is_refused_by_the_check(id, values, told, capsys):
    pairs = [word for at in range(0, len(values), 2) for word in ("-p", *values[at : at + 2])]
    assert main(["run", id, "--check", *pairs]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1


@pytest.mark.parametrize("id", IDS)
def test_rules_name_parameters_of_their_notebook(id):
    known = notebooks.defaults(notebooks.notebook_path(id)).keys() | rules.FUNCTIONS.keys()
    for condition in notebooks.conditions(id):
        nodes = list(ast.walk(ast.parse(condition, mode="eval")))
        named = {(node.id, type(node.ctx)) for node in nodes if isinstance(node, ast.Name)}
        bound = {name for name, how in named if how is ast.Store}  # by "for"
        assert {name for name, _ in named} <= known | bound, condition


def test_rules_are_of_notebooks_that_there_are():
    files = sorted((notebooks.notebook_path(IDS[0]).parents[1]).glob("*/rules.yaml"))
    named = {f"{file.parent.name}/{name}" for file in files for name in notebooks.read_yaml(file)}
    assert len(files) == 4 and named <= set(IDS)


@pytest.mark.parametrize("content", ["", "<<<<<<< HEAD", "[]", '{"cells": [{}]}'])
def test_a_file_that_is_no_notebook_is_named(content: str, add_notebook, capsys):
    id = add_notebook("01_good")
    path = notebooks.notebook_path(id)
    path.write_text(content)
    Path("figures/paper/kwon2024").mkdir(parents=True)
    Path(f"figures/paper/{id}.json").write_text('{"notebook": "a", "library": "b"}')
    for command in (["list"], ["run", id, "--check"]):
        assert main(command) == 2
        assert f"{path} is no notebook as Jupyter saves it" in capsys.readouterr().err


def test_what_jupyter_keeps_in_hidden_folders_is_no_notebook(add_notebook):
    id = add_notebook("01_good")
    for folder in (Path("notebooks/.ipynb_checkpoints"), Path("notebooks/kwon2024")):
        folder.mkdir(exist_ok=True)
        (folder / ".01_good-checkpoint.ipynb").write_text("{}")
    Path("notebooks/.ipynb_checkpoints/Untitled-checkpoint.ipynb").write_text("{}")
    assert notebooks.ids() == [id]


def test_anything_is_refused_in_a_line_or_accepted(tmp_path: Path, monkeypatch, capsys):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    read = functools.cache(notebooks.defaults)  # reading a notebook takes most of the time of a check
    monkeypatch.setattr(notebooks, "defaults", read)
    odd = ["1" * 400, "1" * 5000, "[" * 3000, "nan", "inf", "-inf", "1e308", "-0.0", "null", "true", "[]", "{}",
           "[null]", "[[1]]", "(1,)", "'", "2**3", "\udce9", "0x10", "1_000",
           "9007199254740993", "[1, 1]", "[2.0]"]  # fmt: skip
    plain = st.integers() | st.floats() | st.lists(st.integers(0, 300) | st.floats(0, 10), max_size=4)
    value = st.sampled_from(odd) | plain.map(str) | st.text(max_size=8)
    name = st.text(max_size=6)

    @hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @hypothesis.given(st.data())
    def check(data):
        id = data.draw(st.sampled_from(IDS))
        known = st.sampled_from(sorted(read(notebooks.notebook_path(id))))
        pairs = data.draw(st.lists(st.tuples(known | known | known | name, value), max_size=4))
        words = [word for pair in pairs for word in ("-p", *pair)]
        if data.draw(st.integers(0, 4)) == 0:
            (tmp_path / "own.yaml").write_bytes(data.draw(st.binary(max_size=12) | st.builds(
                lambda name, value: f"{name}: {value}".encode("utf-8", "replace"), known, value)))  # fmt: skip
            words += ["-f", str(tmp_path / "own.yaml")]
        words += data.draw(
            st.sampled_from([[], [], [], ["--label", "a b"], ["--kernel", "nope"], ["--preset", "paper"]])
        )
        try:
            code = main(["run", id, "--check", *words])
        except SystemExit as refused:  # by argparse: a value that begins with a dash
            code = refused.code
        said = capsys.readouterr().err
        assert code in (0, 2) and bool(said) == (code == 2) and "Traceback" not in said

    check()
