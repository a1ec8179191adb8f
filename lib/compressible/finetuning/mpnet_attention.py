"""MPNet's attention by the kernels that other models have: transformers writes it out, for want of a position bias.

The bias depends on the padded length alone: it is made once a pass, for one row, and added to the mask of the padding;
every layer reads that sum. Dropout takes its masks from the same places as written out, so that a run stays the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention


class Encoder(MPNetEncoder):
    """Gives its layers one mask in the place of two."""

    padding: Tensor | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *given: Any, **named: Any) -> Any:
        """As MPNet's; attention_mask (S * B, 1, ., T) is added to the scores."""
        self.padding = attention_mask
        try:
            return super().forward(hidden_states, None, *given, **named)
        finally:
            self.padding = None

    def compute_position_bias(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        """Return what is added to the scores, (1 or S * B, H, T, T)."""
        bias = super().compute_position_bias(x[:1], *given, **named)
        return bias if self.padding is None else bias + self.padding


class Attention(MPNetSelfAttention):
    """Calls `scaled_dot_product_attention`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **given: Any,
    ) -> tuple[Tensor, ...]:
        """As MPNet's, whose form written out gives the weights where they are asked for."""
        if output_attentions or attention_mask is not None:
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **given)
        query, key, value = (
            layer(hidden_states).unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        rate = self.dropout.p if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, position_bias, rate)
        return (self.o(mixed.transpose(1, 2).flatten(2)),)


def give_kernels(model: nn.Module) -> None:
    """Let the MPNets in `model` attend by kernels; their weights and names stay."""
    for module in model.modules():
        if type(module) is MPNetEncoder:
            module.__class__ = Encoder
        elif type(module) is MPNetSelfAttention:
            module.__class__ = Attention
