"""Two processes start and train an adapter like one: DDP, fully_shard, accelerate, Trainer, and one that fails."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")  # the hosts of the GPU tests may lack it

import distributed_helpers as helpers

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """The folder of what the two processes returned; started once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    # One server imports, which takes longest, and the processes are its forks.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["distributed_helpers", "transformers.trainer"]
    )
    torch.multiprocessing.start_processes(helpers.work, (str(folder),), nprocs=2, start_method="forkserver")
    return folder


@pytest.fixture(scope="module")
def alone() -> dict:
    return helpers.alone()


def returned(ranks: Path, name: str) -> tuple[Any, Any]:
    both = [torch.load(ranks / f"{name}{rank}.pt") for rank in range(2)]
    for rank, result in enumerate(both):
        assert not isinstance(result, str), f"rank {rank}: {result}"
    return both[0], both[1]


def assert_close(mine: dict, theirs: dict, rtol: float, atol: float) -> None:
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", [
    "ddp_first", "ddp_first_inner", "ddp_after", "ddp_find_unused", "ddp_static_graph", "fsdp2_first", "fsdp2_after",
])  # fmt: skip
def test_two_processes_train_like_one_on_the_whole_batch(ranks, alone, name):
    first, second = returned(ranks, name)
    assert_close(first["start"], second["start"], 0, 0)
    assert_close(first["end"], second["end"], 1e-6, 1e-7)
    assert_close(first["start"], alone["start"], 1e-4, 1e-5)
    assert_close(first["end"], alone["end"], 1e-4, 1e-5)


def test_a_sharded_model_is_saved_whole(ranks):
    for result in returned(ranks, "fsdp2_saves"):
        torch.testing.assert_close(result["there"], result["again"])


@pytest.mark.parametrize("name", ["through_accelerate", "through_trainer"])
def test_trainer_and_accelerate_keep_processes_equal(ranks, name):
    first, second = returned(ranks, name)
    assert_close(first["start"], second["start"], 0, 0)
    assert_close(first["end"], second["end"], 1e-5, 1e-7)
    assert all(not torch.equal(first["start"][key], first["end"][key]) for key in first["start"])


@pytest.mark.parametrize(("name", "uses"), [
    ("ranks_use_other_layers", [(0,), (1, 0)]), ("ranks_use_another_order", [(0, 1), (1, 0)]),
])  # fmt: skip
def test_ranks_may_run_other_layers(ranks, name, uses):
    first, second = returned(ranks, name)
    assert_close(first, second, 0, 0)
    assert_close(first, helpers.start_alone(uses), 1e-4, 1e-5)


def test_where_one_process_fails_all_raise_and_nothing_is_changed(ranks, alone):
    first, second = returned(ranks, "one_rank_fails")
    told = {"before": "OSError: no more rows", "loss": "RuntimeError: loss_step returned nan",
            "backward": "OSError: the disk is full"}  # fmt: skip
    for trouble, text in told.items():
        assert first[trouble] == (f"RankError: rank 1 failed: {text}" + first[trouble][0].partition(text)[2], True)
        assert second[trouble][0].startswith(text) and second[trouble][1]
    for message, same in (first["gradient"], second["gradient"]):  # summed, it is not finite on both
        assert message.startswith("RuntimeError: the gradient of 'first' holds") and same
    assert_close(first["start"], alone["start"], 1e-4, 1e-5)
    assert_close(first["start"], second["start"], 0, 0)


def test_layers_are_left_out_before_a_model_is_wrapped(ranks):
    for result in returned(ranks, "left_out"):
        assert result["left_out"] == ["middles.0"]
        assert "middles.0" in result["text"] and "only before DistributedDataParallel" in result["text"]
    first, second = returned(ranks, "left_out")
    assert_close(first["start"], second["start"], 0, 0)
    assert not any("middles.0" in name for name in first["start"])


# Two GPUs


@pytest.fixture(scope="module")
def gpus(tmp_path_factory) -> Path:
    """As `ranks`, with NCCL."""
    folder = tmp_path_factory.mktemp("gpus")
    torch.multiprocessing.spawn(helpers.work_on_gpus, (str(folder),), nprocs=2)
    return folder


@pytest.mark.cuda
@TWO_GPUS
@pytest.mark.parametrize("name", ["ddp_first", "fsdp2_first", "fsdp2_after"])
def test_two_gpus_train_like_one_on_the_whole_batch(gpus, name):
    first, second = returned(gpus, name)
    one = helpers.alone("cuda")
    assert_close(first["start"], second["start"], 0, 0)
    assert_close(first["end"], second["end"], 1e-5, 1e-6)
    assert_close(first["start"], one["start"], 1e-3, 1e-4)
    assert_close(first["end"], one["end"], 1e-3, 1e-4)


@pytest.mark.cuda
@TWO_GPUS
def test_where_one_gpu_fails_all_raise(gpus):
    first, second = returned(gpus, "one_rank_fails")
    assert first["backward"] == ("RankError: rank 1 failed: OSError: the disk is full", True)
    assert second["backward"][0] == "OSError: the disk is full"
    assert first["loss"][0].startswith("RankError: rank 1 failed: RuntimeError: loss_step returned nan")
    assert_close(first["start"], second["start"], 0, 0)


@pytest.mark.cuda
@TWO_GPUS
def test_gpus_start_alike_under_autocast_and_refuse_flattened_factors(gpus):
    first, second = returned(gpus, "autocast")
    assert_close(first["start"], second["start"], 0, 0)
    assert all(factor.dtype is torch.float32 and factor.isfinite().all() for factor in first["start"].values())
    for result in returned(gpus, "flattened"):
        assert "expected a matrix in memory: start before FSDP1" in result["text"]
