"""The search of settings: it ends inside, says so where it does not, and looks at each point once."""

from __future__ import annotations

import math

import pytest

from compressible.experiments.setting_grid import search_settings


def bowl(best, seen=None):
    """log-quadratic around `best`; notes what it is asked for."""

    def error_of(at):
        if seen is not None:
            seen.append(at)
        return 1 + sum(math.log(x / y) ** 2 for x, y in zip(at, best, strict=True))

    return error_of


def test_the_best_lies_inside_and_all_its_neighbours_were_seen():
    seen = []
    found = search_settings(bowl((0.01, 8.0), seen), [1.0, 1.0], [10.0, 2.0])
    assert found.settings == (0.01, 8.0) and found.inside and found.error == 1
    assert {(x, y) for x in (0.001, 0.01, 0.1) for y in (4.0, 8.0, 16.0)} <= set(found.tried)
    assert len(seen) == len(set(seen)) == len(found.tried)


def test_where_the_points_are_used_up_the_grid_is_open():
    found = search_settings(bowl((1e-9,)), [1.0], [10.0], most=4)
    assert not found.inside and found.settings == (1e-3,) and len(found.tried) == 4
    assert search_settings(bowl((1.0,)), [1.0], [10.0], most=1).inside is False
    assert search_settings(bowl((1.0,)), [1.0], [10.0], most=3).inside is True


def test_two_settings_may_have_to_move_together():
    ridge = search_settings(
        lambda at: at[0] if at[0] * at[1] > 0.9 and at[0] > 0.1 else 2 * at[0], [1.0, 1.0], [2.0, 2.0]
    )
    assert ridge.settings[0] < 0.3 and ridge.settings[1] > 3 and ridge.inside


def test_a_setting_with_factor_one_stays():
    found = search_settings(bowl((5.0, 8.0)), [1.0, 1.0], [1.0, 2.0])
    assert found.settings == (1.0, 8.0) and {at[0] for at in found.tried} == {1.0}


def test_what_diverges_closes_an_end_and_all_of_it_is_an_error():
    found = search_settings(lambda at: math.nan if at[0] > 2 else 1 / at[0], [1.0], [2.0])
    assert found.settings == (2.0,) and found.inside and found.tried[(4.0,)] == math.inf
    with pytest.raises(ValueError, match="diverge"):
        search_settings(lambda at: math.inf, [1.0], [2.0])


def test_gains_too_small_end_a_walk():
    assert search_settings(lambda at: 1 + 1e-5 * at[0], [1.0], [2.0]).settings == (1.0,)
    assert search_settings(lambda at: 1e-20 * at[0], [1.0], [2.0], floor=1e-16).settings == (1.0,)
    assert search_settings(lambda at: 1e-20 * at[0], [1.0], [2.0], most=5).settings == (0.0625,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": []}, "expected as many, at least one"),
        ({"first": [0.0]}, "first is .0.0."),
        ({"factors": [0.5]}, "factors are .0.5."),
        ({"most": 0}, "most is 0"),
    ],
)
def test_impossible_grids_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        search_settings(bowl((1.0,)), **{"first": [1.0], "factors": [2.0]} | options)
