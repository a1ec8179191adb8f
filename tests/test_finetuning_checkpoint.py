"""Fine-tuning that goes on after a kill: the same as without one, and only where its file is of the same work."""

from __future__ import annotations

import dataclasses
import json
import re
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_finetune import assert_equal, bert, lora, mixed, rows, task
from torch import nn

import compressible as cd
from compressible.finetuning.checkpoint import _plain
from compressible.finetuning.trainer import Trainer
from compressible.finetuning.update_spectra import Spectra, watch_spectra


class Killed(Exception):
    pass


def test_a_killed_call_goes_on_where_it_was(tmp_path):
    runs, data = mixed()[:4], task()
    seen = []

    def watch(snapshot):
        seen.append(snapshot.step)
        if snapshot.step == 8 and seen.count(8) == 1:
            raise Killed
        return [{"norm": update.norm()} for update in next(iter(snapshot.updates()))[1]]

    options = {"steps": 10, "batch_size": 4, "evaluate_at": (0, 5, 10), "watch_at": (2, 8), "watch": watch}
    with pytest.raises(Killed):
        cd.fine_tune(bert(), runs, data, checkpoint=tmp_path / "state.safetensors", checkpoint_every=3, **options)
    resumed = cd.fine_tune(bert(), runs, data, checkpoint=tmp_path / "state.safetensors", checkpoint_every=3, **options)
    assert seen == [2, 8, 8]
    for found, expected in zip(resumed, cd.fine_tune(bert(), runs, data, **options), strict=True):
        assert_equal(found, expected, 1e-12)
        assert found.watched[2]["norm"] == pytest.approx(expected.watched[2]["norm"].item())
    with pytest.raises(ValueError, match="belongs to other runs"):
        cd.fine_tune(bert(), runs, data, checkpoint=tmp_path / "state.safetensors", **(options | {"steps": 12}))
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.filterwarnings("ignore:.* cannot be stacked")
@pytest.mark.parametrize("alone", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"bias": "all"}])
def test_a_killed_run_of_a_kind_that_goes_alone_goes_on_where_it_was(tmp_path, monkeypatch, alone):
    runs, advance = [cd.FineTuningRun(lora(**alone), 1e-2), mixed()[2]], Trainer.advance
    options = {"task": task(), "steps": 6, "batch_size": 4, "evaluate_at": (3, 6), "checkpoint_every": 2}
    expected = cd.fine_tune(bert().float(), runs, **options)

    def killed(trainer, step):
        if step == 5:
            raise Killed
        advance(trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", killed)
        with pytest.raises(Killed):
            cd.fine_tune(bert().float(), runs, checkpoint=tmp_path / "state", **options)
    for found, other in zip(
        cd.fine_tune(bert().float(), runs, checkpoint=tmp_path / "state", **options), expected, strict=True
    ):
        assert_equal(found, other, 1e-6)


def test_a_state_does_not_depend_on_the_order_in_which_layers_are_named(tmp_path):
    names = ["query", "value", "dense", "key"]
    given = {"task": task(), "steps": 2, "batch_size": 4, "checkpoint": tmp_path / "state"}
    for listed in (names, names[::-1]):  # peft keeps a set, whose order differs from process to process
        runs = [cd.FineTuningRun(lora(target_modules=listed), 1e-3)]
        cd.fine_tune(bert(), runs, **given)
    assert _plain({"b", "a", "c"}) == ["a", "b", "c"]


def test_a_state_belongs_to_its_model_and_its_data(tmp_path):
    given = {"runs": [dataclasses.replace(mixed()[0], subset=list(range(20)))], "steps": 2, "batch_size": 4}
    given["checkpoint"] = tmp_path / "state.safetensors"
    cd.fine_tune(bert(), task=task(), **given)
    other = bert()
    other.bert.pooler.dense.weight.data *= 3
    turned = task()
    turned.train.labels = turned.train.labels.flip(0)
    for model, data in ((other, task()), (bert(), turned)):
        with pytest.raises(ValueError, match="belongs to other runs"):
            cd.fine_tune(model, task=data, **given)


def changed_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5


def changed_activation(model):
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def changed_config(model):
    model.config.attention_probs_dropout_prob = 0.5  # which no module holds


def changed_buffer(model):
    model.bert.embeddings.token_type_ids[0, -1] = 1


def changed_late_weight(model):
    model.bert.embeddings.word_embeddings.weight.data[-1, -1] += 1


@pytest.mark.parametrize(
    "change", [changed_dropout, changed_activation, changed_config, changed_buffer, changed_late_weight]
)
def test_a_state_belongs_to_the_whole_model(tmp_path, change):
    given = {"runs": mixed()[1:2], "task": task(), "steps": 2, "batch_size": 4, "checkpoint": tmp_path / "state"}
    (first,) = cd.fine_tune(bert(), **given)
    other = bert()
    assert_equal(cd.fine_tune(other, **given)[0], first, 0)
    change(other)
    with pytest.raises(ValueError, match="belongs to other runs"):
        cd.fine_tune(other, **given)


def test_a_state_belongs_to_its_kind_of_task(tmp_path):
    data = task("classification")
    data.train.labels[:] = data.validation.labels[:] = 0
    given = {"model": bert(1), "runs": mixed()[1:2], "steps": 2, "batch_size": 4, "checkpoint": tmp_path / "state"}
    cd.fine_tune(task=data, **given)
    with pytest.raises(ValueError, match="belongs to other runs"):
        cd.fine_tune(task=dataclasses.replace(data, kind="regression"), **given)


def test_a_state_says_what_is_another(tmp_path, monkeypatch):
    data = cd.Task("own", "classification", 3, "accuracy", rows(12, "classification", 0), rows(8, "classification", 1))
    given = {"task": data, "steps": 2, "batch_size": 4, "checkpoint": tmp_path / "state"}
    first = mixed()[1]
    cd.fine_tune(bert(3), [first], **given)
    with pytest.raises(ValueError, match="by its runs: "):
        cd.fine_tune(bert(3), [dataclasses.replace(first, lr=2 * first.lr)], **given)
    with pytest.raises(ValueError, match="by its settings: "):
        cd.fine_tune(bert(3), [first], **given | {"steps": 3})
    with pytest.raises(ValueError, match="by its task: "):  # its scores would be of the other metric
        cd.fine_tune(bert(3), [first], **given | {"task": dataclasses.replace(data, metric="matthews")})
    with pytest.raises(ValueError, match="by its settings, model: "):
        cd.fine_tune(bert(3, dropout=0.2), [first], **given | {"decay_ratio": 0.5})
    monkeypatch.setattr(cd, "__version__", "9.9")
    with pytest.raises(ValueError, match="by its version of compressible: "):
        cd.fine_tune(bert(3), [first], **given)


def test_a_state_says_which_marks_it_is_past_and_gives_those_that_are_asked_for(tmp_path):
    given = {"model": bert(), "runs": mixed()[1:2], "task": task(), "steps": 6, "batch_size": 4}
    given |= {"checkpoint": tmp_path / "state", "watch": lambda snapshot: [snapshot.step]}
    (first,) = cd.fine_tune(evaluate_at=(0, 6), watch_at=(2, 6), **given)
    with pytest.raises(ValueError, match=r"at step 6 and holds nothing of steps \[3\], which evaluate_at"):
        cd.fine_tune(evaluate_at=(0, 3, 6), **given)
    with pytest.raises(ValueError, match=r"nothing of steps \[0, 4\], which watch_at"):
        cd.fine_tune(evaluate_at=(6,), watch_at=(0, 2, 4), **given)
    (again,) = cd.fine_tune(evaluate_at=(6,), watch_at=(2,), **given)
    assert again.scores == {6: first.scores[6]} and again.watched == {2: 2}


def test_a_finished_state_holds_factors_only_where_they_are_kept(tmp_path):
    given = {"runs": mixed()[1:3], "task": task(), "steps": 2, "batch_size": 4, "evaluate_at": (2,)}
    sizes = {}
    for keep in (True, False):
        place = tmp_path / str(keep)
        first, again = (cd.fine_tune(bert(), **given, keep_factors=keep, checkpoint=place) for _ in range(2))
        sizes[keep] = place.stat().st_size
        for one, other in zip(first, again, strict=True):
            assert one.losses.tolist() == other.losses.tolist() and one.scores == other.scores
            assert one.divergence is other.divergence is None and (one.chains is not None) is keep
    assert sizes[False] < sizes[True] / 2
    with pytest.raises(ValueError, match="belongs to other runs"):
        cd.fine_tune(bert(), **given, checkpoint=tmp_path / "False")


def test_seconds_of_a_resumed_call_hold_those_before(tmp_path):
    given = {"runs": mixed()[1:2], "task": task(), "steps": 3, "batch_size": 4, "checkpoint": tmp_path / "state"}
    (first,) = cd.fine_tune(bert(), watch_at=(0,), watch=lambda _: time.sleep(2) or [None], **given)
    (again,) = cd.fine_tune(bert(), watch_at=(0,), watch=lambda _: pytest.fail("asked twice"), **given)
    assert again.seconds > 2 and first.seconds > 2


def same(one, other) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, Spectra):
        return same(vars(one), vars(other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one == other


def test_what_watch_gave_comes_back_as_it_was(tmp_path):
    shared = torch.arange(6.0).view(2, 3)

    def watch(snapshot):
        (spectra,) = watch_spectra(2)(snapshot)
        arrays = [np.arange(6).reshape(2, 3).T, np.zeros((0, 2)), np.array(3.0), np.array(["a", "bc"]), np.eye(2) * 1j]
        scalars = [np.float32(0.1), np.float64(0.1), np.int64(3), np.bool_(True)]
        tensors = (shared, shared[:, 1], torch.tensor(2), torch.ones(3, dtype=torch.bfloat16), shared.T)
        plain = (1, 2.5, "x", None, True)
        return [{"spectra": spectra, "a": {"b": arrays}, "a.b": scalars, "t": tensors, "plain": plain}]

    given = {"model": bert(layers=1).float(), "runs": mixed()[1:2], "task": task(), "steps": 2, "batch_size": 4}
    given |= {"watch_at": (0, 2), "watch": watch, "checkpoint": tmp_path / "state"}
    (first,), (again,) = cd.fine_tune(**given), cd.fine_tune(**given)
    assert again.watched[0] is not first.watched[0] and same(again.watched, first.watched)


@pytest.mark.parametrize("value, named", [
    ({1, 2}, "a set"), ({0: 1}, "a dict with keys of int"), ([[1j]], "a complex"),
    (np.array([None]), "a ndarray of object"), (torch.ones(2).to_sparse(), "a Tensor of torch.float32 and .*sparse"),
    (dataclasses.make_dataclass("Own", [])(), "a Own"),
])  # fmt: skip
def test_what_a_checkpoint_cannot_hold_is_refused_at_once(tmp_path, monkeypatch, value, named):
    monkeypatch.setattr(Trainer, "advance", lambda *_: pytest.fail("took a step"))
    given = {"runs": mixed()[1:2], "task": task(), "steps": 2, "batch_size": 4, "watch_at": (0, 2)}
    with pytest.raises(ValueError, match=f"watch gave {named}"):
        cd.fine_tune(bert(), watch=lambda _: [value], checkpoint=tmp_path / "state", **given)
    assert not list(tmp_path.iterdir())


def junk(path):
    path.write_bytes(b"nothing")


def empty(path):
    path.touch()


def foreign(path):
    save_file({"weight": torch.zeros(3)}, path)


def foreign_metadata(path):
    save_file({"weight": torch.zeros(3)}, path, {"state": "[]"})


def cut(path):
    cd.fine_tune(bert(), mixed()[:1], task(), 2, 4, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("write", [junk, empty, foreign, foreign_metadata, cut])
def test_a_damaged_or_foreign_checkpoint_is_refused_with_its_path(tmp_path, write):
    path = tmp_path / "state.safetensors"
    write(path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is no checkpoint, or damaged .*: delete it"):
        cd.fine_tune(bert(), mixed()[:1], task(), 2, 4, checkpoint=path)


def interrupted(path):
    """A checkpoint of step 3 of 6."""

    def kill(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cd.fine_tune(bert(), mixed()[:1], task(), 6, 4, checkpoint=path, checkpoint_every=3, watch_at=(4,), watch=kill)


def flipped(path, tensor):
    """Turn one bit of a tensor's middle, without a change of names or shapes."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    first, last = json.loads(content[8 : 8 + length])[tensor]["data_offsets"]
    content[8 + length + (first + last) // 2] ^= 0x10
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("tensor", ["value", "mean", "losses"])
def test_a_flipped_bit_is_noticed(tmp_path, tensor):
    path = tmp_path / "state.safetensors"
    interrupted(path)
    flipped(path, tensor)
    with pytest.raises(ValueError, match=r"is no checkpoint, or damaged .*sha256 of its content .*: delete it"):
        cd.fine_tune(bert(), mixed()[:1], task(), 6, 4, checkpoint=path)


@pytest.mark.parametrize("spoil", [lambda path: flipped(path, "value"), lambda path: path.write_bytes(b"half")])
def test_a_damaged_checkpoint_of_the_cache_is_begun_again(tmp_path, monkeypatch, spoil):
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path))
    path = tmp_path / "checkpoints" / "state"
    path.parent.mkdir()
    interrupted(path)
    spoil(path)
    (whole,) = cd.fine_tune(bert(), mixed()[:1], task(), 6, 4)
    with pytest.warns(UserWarning, match="damaged .*; the run begins again"):
        (again,) = cd.fine_tune(bert(), mixed()[:1], task(), 6, 4, checkpoint=path)
    assert torch.equal(torch.as_tensor(again.losses), torch.as_tensor(whole.losses))


def test_steps_taken_survive_a_checkpoint_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    given = {"runs": mixed()[:1], "task": task(), "steps": 4, "batch_size": 4, "checkpoint_every": 2}
    (whole,) = cd.fine_tune(bert(), **given)
    with pytest.warns(RuntimeWarning, match=rf"no checkpoint at step 2: {re.escape(str(tmp_path))}/file/state: "):
        (history,) = cd.fine_tune(bert(), **given, checkpoint=tmp_path / "file" / "state")
    assert torch.equal(torch.as_tensor(history.losses), torch.as_tensor(whole.losses))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
