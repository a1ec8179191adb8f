"""Settings of one method on a grid without ends: from the best point outwards, until all its neighbours are worse.

The same for every method that is compared: a first point, a factor for each setting, and how many points may be tried.
What the errors are over must judge nothing afterwards: a validation part of the training data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Settings = tuple[float, ...]
GAIN = 2e-4  # of an error in squares, so 1e-4 of its root: less is no gain, and ends a walk along a flat valley


@dataclass(frozen=True, eq=False)
class Search:
    """The chosen `settings`, their error, {settings: error} of all that were `tried`, and whether the best lies inside.

    `inside` is False where the points were used up before all neighbours of the best had been tried.
    """

    settings: Settings
    error: float
    tried: dict[Settings, float]
    inside: bool


def search_settings(
    error_of: Callable[[Settings], float],
    first: Sequence[float],
    factors: Sequence[float],
    most: int = 24,
    gain: float = GAIN,
    floor: float = 0.0,
) -> Search:
    """Walk over the grid first_i * factor_i^k, all integers k, to a point all of whose neighbours are worse.

    Neighbours differ in one setting or in several at once: where a run is short, a smaller scale may help with a larger
    step only.

    Args:
        error_of: the held-out error (a mean of squares, >= 0) at some settings; not finite where they diverge.
        first: where the walk begins, all > 0.
        factors: between neighbours, one a setting, > 1; at 1 a setting stays as it is.
        most: points that may be tried, >= 1; usually 10 to 40.
        gain: the walk goes on where an error falls by more than this share of it.
        floor: ... and by more than this; an error below it counts as zero.

    Returns:
        The `Search`.

    Raises:
        ValueError: for a setting, factor or count out of range, or if the error is finite at no point that was tried.

    Example:
        >>> from compressible.experiments.setting_grid import search_settings
        >>> found = search_settings(lambda at: (at[0] - 8) ** 2, first=[1.0], factors=[2.0], most=9)
        >>> found.settings, found.inside, sorted(found.tried)
        ((8.0,), True, [(0.5,), (1.0,), (2.0,), (4.0,), (8.0,), (16.0,)])
    """
    _check(first, factors, most)
    walk = _Walk(error_of, first, factors, most)
    centre, inside = (0,) * len(first), True
    walk.see(centre)
    moves = list(itertools.product(*[(-1, 0, 1) if factor > 1 else (0,) for factor in factors]))
    moves = sorted((move for move in moves if any(move)), key=lambda move: sum(map(abs, move)))
    left = list(moves)  # not tried from the present centre
    while left and inside:
        move = left.pop(0)
        place = tuple(k + sign for k, sign in zip(centre, move, strict=True))
        inside = walk.see(place)
        if inside and walk.errors[place] < (1 - gain) * walk.errors[centre] - floor:
            centre, left = place, sorted(moves, key=lambda other: other != move)  # what has just helped comes first
    tried = {walk.settings(place): error for place, error in walk.errors.items()}
    if not math.isfinite(walk.errors[centre]):
        raise ValueError(f"all of the settings {list(tried)} diverge, expected one that does not")
    return Search(walk.settings(centre), walk.errors[centre], tried, inside)


@dataclass(frozen=True, eq=False)
class _Walk:
    """The errors at the places of a grid that have been seen."""

    error_of: Callable[[Settings], float]
    first: Sequence[float]
    factors: Sequence[float]
    most: int
    errors: dict[tuple[int, ...], float] = field(default_factory=dict)

    def settings(self, place: Sequence[int]) -> Settings:
        """The settings there, to six digits, so that powers of a factor read as one would write them."""
        parts = zip(place, self.first, self.factors, strict=True)
        return tuple(float(f"{start * factor**k:.6g}") for k, start, factor in parts)

    def see(self, place: tuple[int, ...]) -> bool:
        """Try a place unless that has been done; False if there are no points left for it."""
        if place not in self.errors:
            if len(self.errors) == self.most:
                return False
            error = self.error_of(self.settings(place))
            self.errors[place] = error if math.isfinite(error) else math.inf
        return True


def _check(first: Sequence[float], factors: Sequence[float], most: int) -> None:
    if len(first) != len(factors) or not len(first):
        raise ValueError(f"first is {list(first)} and factors {list(factors)}, expected as many, at least one")
    if not all(math.isfinite(start) and start > 0 for start in first):
        raise ValueError(f"first is {list(first)}, expected finite numbers > 0")
    if not all(1 <= factor < math.inf for factor in factors):
        raise ValueError(f"factors are {list(factors)}, expected finite numbers >= 1")
    if not isinstance(most, int) or most < 1:
        raise ValueError(f"most is {most!r}, expected an integer >= 1")
