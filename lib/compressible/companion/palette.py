"""The colours of all figures: one for each role, and `colors`, which gives every name one of its own."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

from compressible.runtime import checks

__all__ = ["COLORS", "PALETTE", "colors"]

# Okabe and Ito's colours, told apart with any colour vision; their yellow is too pale for lines and labels.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLORS = {
    "original": "#0072B2",
    "compressed": "#D55E00",
    "accelerated": "#E69F00",
    "narrow": "#009E73",
    "alternating": "#CC79A7",
    "baseline": "#6F6F6F",
    "secondary": "#56B4E9",
    "reference": "#000000",
}
# For what is asked beyond those: brown, indigo, leaf green, purple, as far from all of them as we found.
_ALL = (*PALETTE, COLORS["baseline"], "#661100", "#332288", "#8FCB3C", "#AA4499")
_Name = TypeVar("_Name", bound=Hashable)


def colors(names: Iterable[_Name]) -> dict[_Name, str]:
    """A colour for each name, no two the same, so that no curve is dropped for want of one.

    Args:
        names: what is drawn, up to 12 distinct names. One that `COLORS` has as a role gets that role's colour;
            the others get, in their order, what `PALETTE` and some further colours have left.

    Returns:
        {name: colour as "#RRGGBB"}, in the order of the names.

    Raises:
        ValueError: for a name that is there twice, and for more names than there are colours to tell apart. Values in
            order, of a width or a rate, are better drawn in shades of one colour, as by `seaborn.color_palette`.

    Example:
        >>> colors(["original", "alpha = 1", "alpha = 5"])
        {'original': '#0072B2', 'alpha = 1': '#D55E00', 'alpha = 5': '#009E73'}
    """
    asked = list(names)
    checks.expect("names", asked, len(set(asked)) == len(asked), "each of them once")
    known = {name: COLORS[name] for name in asked if isinstance(name, str) and name in COLORS}
    spare = (color for color in _ALL if color not in known.values())
    try:
        return {name: known[name] if name in known else next(spare) for name in asked}
    except StopIteration:
        raise ValueError(f"names: got {len(asked)} of them, expected at most {len(_ALL)} to tell apart") from None
