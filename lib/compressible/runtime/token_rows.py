"""Which of the tensors that a language model is given lie along a row of tokens."""

from __future__ import annotations

from torch import Tensor


def along_rows(tokens: dict[str, Tensor]) -> list[str]:
    """The names of the tokens that lie along a row, as attention_mask (N, T) does, and are cut and padded with it.

    None without a mask of two axes; what a decoder is given lies along another row.
    """
    mask = tokens.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return []
    wide = [name for name, value in tokens.items() if value.dim() > 1 and value.shape[1] == mask.shape[1]]
    return [name for name in wide if not name.startswith("decoder_")]
