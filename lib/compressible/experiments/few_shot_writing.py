"""Few-shot writing: LoRA's starts and Deep LoRA's variants on the same few pairs of data and text, seed by seed.

Four methods adapt every linear layer of a language model but the one that writes words, and words' embeddings, which
are that layer's weights in many models, stay as they are (the authors' code adapts T5's). After training each run
writes one text for every meaning among the validation rows, which is compared with the first of the meaning's reference
texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from peft import LoraConfig
from torch import nn

from compressible.adapters.config import DeepLoraConfig
from compressible.data import pretrained, prompts
from compressible.data.examples import Examples
from compressible.data.metrics import bleu
from compressible.data.tasks import Task, load_task
from compressible.data.written_metrics import METRICS, without_meteor, written_scores
from compressible.experiments.few_shot import Method
from compressible.experiments.tiny_writer import TINY, tiny_writer
from compressible.finetuning.lora import paper_lora_start
from compressible.finetuning.run import RunHistory
from compressible.finetuning.writing import merged_model, written_texts
from compressible.runtime.checks import expect
from compressible.runtime.devices import resolve_device
from compressible.runtime.progress import progress

LORA = ("paper", "standard")  # starts: N(0, 1) on the output side without scaling; Kaiming and zero
DEEP = ("thin", "compressed")
METHODS = (*LORA, *DEEP)
EXAMPLES = 2  # meanings whose texts a record keeps


@dataclass(frozen=True)
class Subject:
    """A language model on its device, its tokenizer, and a task whose validation rows have one meaning each."""

    model: Any
    tokenizer: Any
    task: Task

    @property
    def prompts(self) -> list[str]:
        """What the model is given to write of, for each validation row."""
        texts = self.task.validation.texts
        return prompts.prompts(texts) if self.task.kind == "causal" else [text for (text,) in texts]

    @property
    def references(self) -> list[str]:
        """The first reference text of each validation row."""
        return [known[0] for known in self.task.validation.references]


@dataclass(frozen=True)
class Search:
    """How texts are written: width of the beam search, word pieces of a text at most, prompts side by side."""

    beams: int
    longest: int
    rows: int
    precision: str = "float32"


def load_subject(name: str, task: str, max_length: int, validation_rows: int, device: str, seed: int = 0) -> Subject:
    """A language model by name, or TINY, which is trained first, and the task as the authors have it.

    Args:
        name: as for `load_causal_lm` or `load_seq2seq`, which the model's settings decide, or "tiny".
        task: such as "e2e" or "wordnet-glosses".
        max_length: word pieces of meaning and text at most; longer rows are dropped.
        validation_rows: meanings to write of, evenly spread over those of the validation rows, 0 for all.
        device: "cpu", "cuda", "cuda:N" or "auto".
        seed: what the tiny model's start and batches depend on.
    """
    place = resolve_device(device)
    if name == TINY:
        model, tokenizer = tiny_writer(task, seed)
    elif pretrained.writes_from_another(name):
        model, tokenizer = pretrained.load_seq2seq(name)
    else:
        model, tokenizer = pretrained.load_causal_lm(name)
    load = load_task if model.config.is_encoder_decoder else prompts.load_causal_task
    loaded = load(task, tokenizer, "authors", max_length)
    validation = one_a_meaning(loaded.validation, validation_rows)
    return Subject(model.to(place), tokenizer, replace(loaded, validation=validation))


def one_a_meaning(rows: Examples, count: int = 0) -> Examples:
    """The first row of each meaning, or of `count` of them, evenly spread; references stay all."""
    expect("validation_rows", count, count >= 0, "an integer >= 0")
    firsts = sorted({text: row for row, text in reversed([*enumerate(rows.texts)])}.values())
    count = min(count or len(firsts), len(firsts))
    return rows.take([firsts[at * len(firsts) // count] for at in range(count)])


def methods(model: nn.Module, rank: int, init_scale: float, rate: float, inner_rate: float) -> dict[str, Method]:
    """Each of METHODS: r = `rank`, eps = `init_scale`; compressed inner factors learn at `inner_rate`."""
    shared: dict[str, Any] = {"target_modules": linear_layers(model), "r": rank}
    lora = LoraConfig(lora_alpha=rank, **shared)
    deep: dict[str, Any] = {"depth": 3, "init_scale": init_scale, **shared}
    return {
        "paper": Method(lora, rate, paper_lora_start),
        "standard": Method(lora, rate),
        "thin": Method(DeepLoraConfig(variant="thin", lr_ratio=1.0, **deep), rate),
        "compressed": Method(DeepLoraConfig(variant="compressed", lr_ratio=rate / inner_rate, **deep), inner_rate),
    }


def linear_layers(model: Any) -> list[str]:
    """Names of a language model's linear layers but the one that writes words."""
    words = model.get_output_embeddings()
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not words]


def outcome(
    histories: Sequence[RunHistory],
    subject: Subject,
    search: Search,
    seeds: int,
    score: Callable[[Sequence[str], Sequence[str]], dict[str, float]] = written_scores,
) -> dict[str, Any]:
    """What runs by method and seed, the last one fastest, write and what it is worth.

    "scores" (methods, seeds, metrics) by the list "metrics", why METEOR is not among them or "", "untuned" (metrics,)
    of the model before training, "losses" (methods, seeds, steps), "validation losses" (methods, seeds) in
    nats a word, `gains`, "several references" (methods, seeds), BLEU against all texts of a meaning, and examples of
    what is written by the first seed. A run that diverged is NaN everywhere.
    """
    references, shape = subject.references, (len(METHODS), seeds)
    before = _written(subject, subject.model, search)
    first = score(before, references)
    metrics = [name for name in METRICS if name in first]
    texts = [_written_by(history, subject, search) for history in progress(histories, "writing")]
    scores = np.array([_row(each, references, metrics, score) for each in texts]).reshape(*shape, -1)
    untuned = np.array([first[name] for name in metrics])
    known = subject.task.validation.references
    return {
        "metrics": metrics,
        "without METEOR": without_meteor(),
        "scores": scores,
        "untuned": untuned,
        **gains(dict(zip(METHODS, scores, strict=True)), untuned, metrics),
        "several references": np.array([_several(each, known) for each in texts]).reshape(shape),
        "losses": np.array([run.losses for run in histories]).reshape(*shape, -1),
        "validation losses": np.array([run.scores[max(run.scores)] for run in histories]).reshape(shape),
        "examples": examples(subject, before, texts[::seeds]),
        "sources": list(subject.task.sources),
        "meanings": len(references),
    }


def gains(scores: Mapping[str, np.ndarray], untuned: np.ndarray, metrics: Sequence[str]) -> dict[str, np.ndarray]:
    """Per seed (S,) what each variant gains over LoRA's starts and over the model before training.

    From scores (S, metrics) by METHODS and `untuned` (metrics,): "<variant> - <start or untuned>, <metric>".
    """
    others = {start: scores[start] for start in LORA} | {"untuned": untuned[None]}
    return {
        f"{variant} - {other}, {metric}": scores[variant][:, at] - values[:, at]
        for variant in DEEP
        for other, values in others.items()
        for at, metric in enumerate(metrics)
    }


def examples(subject: Subject, before: Sequence[str], texts: Sequence[Sequence[str] | None]) -> list[list[str]]:
    """Rows (meaning, a reference, the untuned model's text, one of each method) of evenly spread meanings."""
    meanings, count = subject.task.validation.texts, len(before)
    rows = [(2 * at + 1) * count // (2 * EXAMPLES) for at in range(min(EXAMPLES, count))]
    return [
        [meanings[row][0], subject.references[row], before[row], *("" if each is None else each[row] for each in texts)]
        for row in rows
    ]


def _row(
    texts: Sequence[str] | None,
    references: Sequence[str],
    metrics: Sequence[str],
    score: Callable[[Sequence[str], Sequence[str]], dict[str, float]],
) -> list[float]:
    if texts is None:
        return [float("nan")] * len(metrics)
    found = score(texts, references)
    return [found[name] for name in metrics]


def _several(texts: Sequence[str] | None, known: Sequence[Sequence[str]]) -> float:
    return float("nan") if texts is None else bleu(texts, known)


def _written_by(history: RunHistory, subject: Subject, search: Search) -> list[str] | None:
    return None if history.divergence is not None else _written(subject, merged_model(history), search)


def _written(subject: Subject, model: nn.Module, search: Search) -> list[str]:
    given = (search.beams, search.longest, search.rows, search.precision)
    return written_texts(model, subject.tokenizer, subject.prompts, *given)
