"""Passes on several devices, a process each: the same numbers as on one, and what happens when a process dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")  # a GPU host may have PyTorch, Triton and pytest alone
pytest.importorskip("peft")
import peft
from transformers import BertConfig, BertForSequenceClassification

import compressible as cd
from compressible.finetuning.devices import Pass, claimed, device_names, split
from compressible.finetuning.parcel import pack, unpack
from compressible.finetuning.spread import _sendable, spread

CPUS = ["cpu", "cpu"]
OPTIONS = {"steps": 6, "batch_size": 4, "evaluate_at": (0, 6), "show_progress": False}


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=24, num_labels=1))
    return made.double().eval()


def task() -> cd.Task:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (40, 12), generator=draw)
    mask = (torch.arange(12) < torch.randint(4, 13, (40, 1), generator=draw)).long()
    rows = cd.Examples({"input_ids": ids * mask, "attention_mask": mask}, torch.rand(40, generator=draw), texts=())
    return cd.Task("random", "regression", 1, "pearson", train=rows, validation=rows)


def config(variant: str = "thin", **given) -> cd.DeepLoraConfig:
    values = {"r": 4, "init_scale": 0.1, "task_type": "SEQ_CLS", "target_modules": "all-linear"}
    return cd.DeepLoraConfig(variant=variant, **(values | given))


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="SEQ_CLS")


def runs() -> list[cd.FineTuningRun]:
    Run = cd.FineTuningRun
    return [
        Run(config("compressed"), 1e-2, 3, label="compressed"),
        Run(config("thin", r=6), 1e-3, 0),
        Run(lora(), 1e-3, 1, head_lr=1e-2, subset=torch.arange(20)),
        Run(config("thin"), 1e-3, 4),
    ]


def norms(snapshot):
    return [{"norm": update.norm(), "at": os.getpid()} for update in next(iter(snapshot.updates()))[1]]


@pytest.fixture(scope="module")
def alone():
    return cd.fine_tune(bert(), runs(), task(), watch_at=(3,), watch=norms, **OPTIONS)


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-9)
        assert one.scores == pytest.approx(other.scores, rel=1e-9)
        assert one.divergence == other.divergence and one.run is not None
        for name, chain in other.chains.items():
            for factor, wanted in zip(one.chains[name], chain, strict=True):
                torch.testing.assert_close(factor, wanted)


def test_two_processes_give_the_numbers_of_one(alone):
    model, given = bert(), runs()
    found = cd.fine_tune(model, given, task(), watch_at=(3,), watch=norms, devices=CPUS, **OPTIONS)
    assert_equal(found, alone)
    assert [history.shared for history in found] == [2, 2, 2, 2] and alone[0].shared == 4
    places = [history.watched[3]["at"] for history in found]
    assert os.getpid() not in places
    for history, run, other in zip(found, given, alone, strict=True):
        assert history.run is run and history.base is model
        assert history.watched[3]["norm"] == pytest.approx(other.watched[3]["norm"].item())
        assert torch.isfinite(history.model()(task().train.tokens["input_ids"]).logits).all()


def test_a_pass_whose_process_died_goes_on_from_its_state(alone, tmp_path):
    def write_half(tensors, path, meta):
        path.write_bytes(b"half")
        (tmp_path / "died").write_text(str(os.getpid()))
        (tmp_path / "half").write_text(str(path))
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(snapshot):
        if snapshot.step == 4 and snapshot.runs[0].seed == 1 and not (tmp_path / "died").exists():
            import compressible.finetuning.checkpoint as here  # of the process in which the pass is

            here.save_file = write_half
        return norms(snapshot)

    state = tmp_path / "state.safetensors"
    given = {"watch_at": (1, 4), "watch": watch, "checkpoint": state, "checkpoint_every": 2, "devices": CPUS}
    with pytest.warns(UserWarning, match=r"a process died; tried once more: .*runs 2, 1"):
        found = cd.fine_tune(bert(), runs(), task(), **given, **OPTIONS)
    assert_equal(found, alone)
    died = int((tmp_path / "died").read_text())
    assert found[2].watched[1]["at"] == died != found[2].watched[4]["at"]
    here = given | {"watch": norms, "devices": None, "max_stack": 2}  # passes of the same cut
    assert cd.fine_tune(bert(), runs(), task(), **here, **OPTIONS)[2].watched == found[2].watched
    half = Path((tmp_path / "half").read_text())
    assert half.parent == tmp_path and half.name.startswith(f".{state.name}.")
    assert sorted(tmp_path.iterdir()) == [
        tmp_path / name for name in ("died", "half", f"{state.name}.0", f"{state.name}.1")
    ]


def two_passes(train):
    parts = {"task": None, "settings": None}
    return spread(train, nn.Linear(2, 2), [Pass([], None, name) for name in ("one", "two")], parts, CPUS, False)


@pytest.fixture
def interruptible():
    """What is started in the background of a script ignores SIGINT, and so would the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_the_processes(tmp_path, interruptible):
    def train(*given):
        try:
            (tmp_path / f"first.{os.getpid()}").touch()
            (tmp_path / "first").mkdir()
        except FileExistsError:  # one interrupt is enough
            os.kill(parent, signal.SIGINT)
        time.sleep(60)

    parent, began = os.getpid(), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        two_passes(train)
    assert time.monotonic() - began < 50
    pids = [int(file.suffix[1:]) for file in tmp_path.glob("first.*")]
    assert len(pids) == 2 and parent not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_pass_whose_process_dies_twice_is_named():
    def train(model, runs, task, settings, checkpoint):
        os._exit(3)

    with (
        pytest.warns(UserWarning, match=r"a process died; tried once more: .*EXIT\(3\)"),
        pytest.raises(RuntimeError, match=r"died before, while these ran: .*(one|two).*give fewer devices"),
    ):
        two_passes(train)


def test_an_error_in_a_pass_names_it():
    def watch(snapshot):
        raise NotImplementedError("no such layer")

    with pytest.raises(NotImplementedError, match="no such layer") as caught:
        cd.fine_tune(bert(), runs(), task(), watch_at=(1,), watch=watch, devices=["cpu"], **OPTIONS)
    assert caught.value.__notes__ == ["in pass 1 of 1 (runs 2, 1, 3, compressed), on cpu"]


def test_an_error_that_cannot_be_read_again_is_sent_as_its_message():
    class Awkward(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    sent = _sendable(Awkward(1, 2), "in pass 1")
    assert type(sent) is RuntimeError and str(sent) == "Awkward: 1 and 2" and sent.__notes__ == ["in pass 1"]
    assert type(_sendable(KeyError("a"), "in pass 1")) is KeyError


def test_what_cannot_be_sent_is_refused_by_name():
    lock, data = threading.Lock(), task()
    with pytest.raises(ValueError, match=r"^watch cannot be sent to another process.*lock.*expected no open file"):
        cd.fine_tune(bert(), runs(), data, watch_at=(1,), watch=lambda seen: lock, devices=CPUS, **OPTIONS)
    object.__setattr__(data, "lock", lock)  # a task is frozen
    with pytest.raises(ValueError, match=r"^task cannot be sent to another process.*lock"):
        cd.fine_tune(bert(), runs(), data, devices=CPUS, **OPTIONS)


@pytest.mark.parametrize("devices", [0, -1, True, 1.5, "cuda", "gpu", [], [0], ["meta"], ["tpu:0"], None])
def test_devices_that_there_are_not_are_refused(devices):
    with pytest.raises(ValueError, match=r"devices? is .*expected"):
        device_names(devices)


def test_devices_are_named():
    assert device_names(["cpu", torch.device("cpu")]) == CPUS
    if not torch.cuda.is_available():
        for asked in ("all", 2):
            with pytest.raises(ValueError, match=rf"devices is {asked!r}, expected a list such as .*sees 0 CUDA"):
                device_names(asked)


@pytest.mark.parametrize(
    ("passes", "devices", "expected"),
    [
        ([range(20)], 1, [20]),
        ([range(20)], 2, [10, 10]),
        ([range(20)], 3, [7, 7, 6]),
        ([range(2)], 4, [1, 1]),
        ([range(10), range(10, 20), range(20, 30)], 2, [5, 5, 10, 10]),
        ([range(12), range(12, 20)], 2, [12, 8]),
    ],
)
def test_passes_are_cut_until_devices_are_busy(passes, devices, expected):
    pieces = split(passes, [1.0] * 30, devices)
    assert [len(piece) for piece in pieces] == expected
    assert [run for piece in pieces for run in piece] == [run for members in passes for run in members]


def test_costly_runs_are_cut_first():
    assert [len(piece) for piece in split([range(4), range(4, 8)], [1.0] * 4 + [3.0] * 4, 2)] == [4, 2, 2]


def test_a_claimed_device_is_given_to_nobody_else(tmp_path):
    with claimed(["cpu", "cuda:0"], tmp_path) as one, claimed(["cpu", "cuda:0"], tmp_path) as other:
        assert {one, other} == {"cpu", "cuda:0"}
    with claimed(["cpu"], tmp_path) as again:
        assert again == "cpu"


def test_a_parcel_keeps_tensors_their_ties_and_their_kinds():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    shifted = torch.arange(12.0).view(3, 4).T
    given = {"model": model, "odd": [shifted, torch.tensor(True), torch.zeros(0, 2), torch.ones(2) + 1j, "text"]}
    parcel = pack(given)
    for own in (True, False):
        found = unpack(parcel, torch.device("cpu"), own)
        other = found["model"]
        assert other[0].weight is other[1].weight and other[0].weight.dtype is torch.bfloat16
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
        for name, value in model.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)
        for one, wanted in zip(found["odd"], given["odd"], strict=True):
            assert torch.equal(one, wanted) if isinstance(one, torch.Tensor) else one == wanted
        inside = other[0].weight.data_ptr() - parcel.content.ctypes.data
        assert (0 <= inside < len(parcel.content)) is not own
    parcel.content.flags.writeable = False
    unpack(parcel, torch.device("cpu"))["model"][2].running_mean += 1
    assert unpack(parcel, torch.device("cpu"))["model"][2].running_mean.sum() == 0


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_processes_on_gpus_give_the_numbers_of_one():
    def watch(snapshot):
        return list(next(iter(snapshot.updates()))[1].norm(dim=(1, 2)))

    given, data, model = runs(), task(), bert().cuda()
    places = device_names("all") if torch.cuda.device_count() > 1 else ["cuda:0", "cuda:0"]
    one = cd.fine_tune(model, given, data, watch_at=(3,), watch=watch, **OPTIONS)
    many = cd.fine_tune(model, given, data, watch_at=(3,), watch=watch, devices=places, **OPTIONS)
    assert_equal(many, one)
    for history in many:
        tensors = [history.watched[3], *(factor for chain in history.chains.values() for factor in chain)]
        assert {tensor.device for tensor in tensors} == {next(model.parameters()).device}
    from_cpu = cd.fine_tune(bert(), given, data, devices=places, **OPTIONS)
    assert {factor.device.type for history in from_cpu for factor in history.chains.popitem()[1]} == {"cpu"}
