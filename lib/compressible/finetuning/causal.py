"""Causal language models: words only where labels ask for one, and their losses without all logits at once.

P rows, T tokens, K words that are asked for in a row, h the size of a state, V words. Sixteen runs of 1,024 tokens and
150,000 words are ten gigabytes of logits, so the frozen layer that writes words is passed over while the model runs;
it meets the states of the words asked for in chunks, whose gradient is taken before the next chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from compressible.data.examples import IGNORED
from compressible.finetuning.losses import first_output, widened
from compressible.finetuning.peft_models import base_of
from compressible.runtime.checks import expect

LOGITS = 2**27  # of a chunk at most: half a gigabyte in float32


class Words:
    """How a pass reads a causal model.

    layer: the one that writes words, while it is passed over; None: logits are taken whole, as of a layer that is
    trained, or where the model goes on after it. masked: whether the model is told of the padding at the end of rows,
    which no earlier token can see: without a mask attention has its fastest kernel.
    """

    def __init__(self) -> None:
        self.layer: Any = None
        self.masked = True

    def pass_over(self, model: nn.Module) -> None:
        """Let the model give states in the place of logits from now on, if its last layer is a plain frozen one."""
        layer: Any = writer(model)
        if type(layer) is nn.Linear and not layer.weight.requires_grad:
            self.layer = layer
            self.layer.forward = _same

    def put_back(self) -> None:
        """Let the model give logits again."""
        if self.layer is not None:
            del self.layer.forward
        self.layer = None

    def inputs(self, model: nn.Module, tokens: dict[str, Tensor]) -> dict[str, Any]:
        """Return what a model is called with: no cache of keys and values, which is for writing."""
        given = {name: value for name, value in tokens.items() if self.masked or name != "attention_mask"}
        cached = hasattr(getattr(model, "config", None), "use_cache")
        return given | {"use_cache": False} if cached else given

    def read(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """Return the states (P, K, h), or without a `layer` the logits (P, K, V), before the words asked for.

        Prompts that peft puts before a row have outputs of their own, which come first.
        """
        found, tokens = first_output(model(**inputs)), inputs["input_ids"].shape[1]
        ahead = found.shape[1] - tokens
        expect("the model's outputs", tuple(found.shape), ahead >= 0, f"one for each of {tokens} tokens, or more")
        return found.take_along_dim(labels[..., :1] + ahead if ahead else labels[..., :1], 1)

    def losses(self, found: Tensor, labels: Tensor, runs: int) -> tuple[Tensor, Tensor]:
        """Return the sums (S,) of the runs' cross-entropies, in nats, and the numbers of their words, from `read`."""
        words = labels[..., 1].flatten()
        if self.layer is None:
            each = functional.cross_entropy(widened(found.flatten(0, 1)), words, reduction="none", ignore_index=IGNORED)
        else:
            learns = torch.is_grad_enabled() and found.requires_grad
            each = _WordLosses.apply(found.flatten(0, 1), words, self.layer.weight, self.layer.bias, learns)
        return each.view(runs, -1).sum(1), (words != IGNORED).view(runs, -1).sum(1)


def asked_words(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N, K, 2), the place before each word that is asked for, and the word; and how many (N,) a row asks for.

    labels (N, T): the row's own tokens where they are asked for, -100 elsewhere, with which rows of fewer words are
    filled. The first token is never asked for, since nothing stands before it.
    """
    words = labels[:, 1:]
    asked = words != IGNORED
    counts = asked.sum(1)
    most = int(counts.max()) if len(counts) else 0
    places = asked.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    taken = torch.arange(most, device=labels.device) < counts[:, None]
    found = torch.where(taken, words.gather(1, places), IGNORED)
    return torch.stack((torch.where(taken, places, 0), found), 2), counts.cpu()


def writer(model: Any) -> nn.Module | None:
    """Return the layer that writes words of a model of transformers', of peft's over one, or of a pass; None: none."""
    inner = getattr(model, "inner", model)
    inner = base_of(inner) if isinstance(inner, PeftModel) else inner
    find = getattr(inner, "get_output_embeddings", None)
    return None if find is None else find()


def goes_on(model: nn.Module, words: Words, inputs: dict[str, Any]) -> bool:
    """Whether a model changes what its last layer, which is passed over, has given: caps or scales logits, say."""
    given: list[Tensor] = []

    def seen(states: Tensor) -> Tensor:
        given.append(states)
        return states

    words.layer.forward = seen
    try:
        found = first_output(model(**inputs))
    except RuntimeError:  # as of shapes that are not the logits'
        return True
    finally:
        words.layer.forward = _same
    return len(given) != 1 or found.shape != given[0].shape or not torch.equal(found.to(given[0].dtype), given[0])


class _WordLosses(torch.autograd.Function):
    """Cross-entropies (P,) of words (P,) after states (P, h), a chunk of logits at a time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, words: Tensor, weight: Tensor, bias: Tensor | None, learns: bool) -> Tensor:
        """weight (V, h) and bias (V,) are frozen; learns: whether the gradient of the states is asked for."""
        size = max(1, LOGITS // weight.shape[0])
        slopes, losses = [], []
        for part, asked in zip(states.split(size), words.split(size), strict=True):
            loss, slope = _chunk(part, asked, weight, bias, learns)
            losses.append(loss)
            slopes.append(slope)
        if learns:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient of the states."""
        (slopes,) = ctx.saved_tensors
        return slopes * grad[:, None].to(slopes.dtype), None, None, None, None


def _chunk(states: Tensor, words: Tensor, weight: Tensor, bias: Tensor | None, learns: bool) -> tuple[Tensor, Tensor]:
    """Return the losses (P,) and, if it `learns`, each loss's gradient (P, h) in its state."""
    logits = widened(functional.linear(states, weight, bias))
    total = logits.logsumexp(1, keepdim=True)
    taken, asked = (words != IGNORED)[:, None], words.clamp(min=0)[:, None]
    losses = torch.where(taken, total - logits.gather(1, asked), 0)[:, 0]
    if not learns:
        return losses, states
    slopes = logits.sub_(total).exp_().scatter_add_(1, asked, torch.full_like(total, -1.0)).mul_(taken)
    return losses, slopes.to(states.dtype) @ weight


def _same(states: Tensor) -> Tensor:
    return states
