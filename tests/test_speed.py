"""Counting by hand, the peers against the reference, every engine timed or saying why not, and how cost grows."""

import math

import numpy as np
import pytest
import torch

import compressible as cd
from compressible.descent.engines.reference import Reference
from compressible.experiments.speed import engines, roofline, scaling, workloads
from compressible.experiments.speed.peers import Autograd, Jax
from compressible.runtime import devices

CPU = {"rank": 2, "dtype": torch.float64, "device": "cpu", "seed": 0}


def _small(**options):
    return workloads.completion(12, observed=0.5, **(CPU | options))


def test_operations_and_bytes_of_a_small_step_by_hand():
    # m = 2, n = 3, k = 1, L = 2: three products of 2 * 6, residual 2 * 6, updates 2 * 5; target 6, factors 5 numbers
    assert roofline.count_step((2, 3), 1, 2, 8) == roofline.Work(3 * 12 + 12 + 10, 8 * (6 + 10))
    # m = n = 4, k = 2, L = 3: 3 * 2 * 16 * 2, inner 3 * 2 * 4 * 4, residual 32, parameters 8 + 4 + 8
    assert roofline.count_step((4, 4), 2, 3, 4, stack=5) == roofline.Work(5 * (192 + 96 + 32 + 40), 5 * 4 * (16 + 40))
    # the same with 7 entries: 3 * 2 * 7 * 2, inner as before, residual 14; 16 bytes an entry
    assert roofline.count_sparse_step((4, 4), 7, 2, 3, 8) == roofline.Work(84 + 96 + 14 + 40, 7 * 16 + 8 * 40)
    six_products = 6 * 2 * 100**3
    assert roofline.count_step((100, 100), 100, 3, 8).operations == six_products + 2 * 100**2 + 2 * 3 * 100**2


def test_the_bound_is_the_longer_of_arithmetic_and_memory():
    work = roofline.Work(operations=600, bytes=100)
    assert work.bound(operations_rate=100, bytes_rate=100) == 6
    assert work.bound(operations_rate=1000, bytes_rate=100) == 1


def test_measured_rates_are_of_this_world():
    assert 1e8 < roofline.bytes_rate("cpu", size=2**20, seconds=0.01, trials=2) < 1e13
    assert 1e7 < roofline.gemm_rate((64, 64, 64), torch.float64, "cpu", seconds=0.01, trials=2) < 1e15
    assert 0 < roofline.launch_seconds("cpu", seconds=0.01, trials=2) < 1e-2


def test_calls_are_repeated_to_fill_the_time_and_waited_for():
    calls = []
    times = roofline.time_calls(lambda: calls.append("call"), lambda: calls.append("wait"), 0.0, 3)
    assert times.shape == (3,) and (times >= 0).all()
    assert calls[0] == "call" and calls[-1] == "wait" and calls.count("wait") == 2 * (1 + 3)


@pytest.mark.parametrize("kind", [Autograd, pytest.param(Jax, id="jax")])
@pytest.mark.parametrize("options", [{}, {"stack": 3}, {"full": True}, {"dtype": torch.float32}], ids=str)
def test_the_peers_take_the_reference_steps(kind, options):
    if kind is Jax:
        pytest.importorskip("jax", reason="jax is not installed, and need not be")
    work = _small(**options)
    slow = Reference(work.problem, work.factors, work.rates, 0.02)
    loop = kind(work.problem, work.factors, work.rates, 0.02)
    loop.prepare(5)
    slow.advance(10)
    loop.advance(5)
    loop.advance(5)
    loop.wait()
    close = {"rtol": 1e-10, "atol": 1e-14} if work.problem.dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    for mine, other in zip(loop.factors, slow.factors, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine.detach(), other, **close)
    torch.testing.assert_close(loop.evaluate(), slow.evaluate(), **close)


@pytest.mark.parametrize("kind", [Autograd, pytest.param(Jax, id="jax")])
@pytest.mark.parametrize("stack", [0, 2])
def test_the_peers_stop_where_descend_does(kind, stack):
    if kind is Jax:
        pytest.importorskip("jax", reason="jax is not installed, and need not be")
    work = _small(stack=stack)
    ratio = work.outer_ratio
    expected = cd.descend(work.problem, work.factors, work.step_size, 6000, ratio, record_every=20, tolerance=1e-4)
    loop = kind(work.problem, work.factors, work.rates, 0.0)
    assert loop.until(6000, 20, math.inf) == 0
    assert 0 < loop.until(6000, 20, 1e-4) == int(expected.stopped.max()) < 6000
    again = kind(work.problem, work.factors, work.rates, 0.0)
    assert again.until(40, 20, 0.0) == 40


def test_autograd_takes_the_sparse_steps_and_refuses_what_it_cannot():
    work = workloads.sparse_completion(15, entries=60, width=4, **CPU)
    loop = Autograd(work.problem, work.factors, work.rates, 0.0)
    loop.advance(6)
    end = cd.descend(work.problem, work.factors, work.step_size, 6, work.outer_ratio)
    for mine, other in zip(loop.factors, end.factors, strict=True):
        torch.testing.assert_close(mine.detach(), other)
    torch.testing.assert_close(loop.evaluate()[0].item(), end.final("loss").item())
    with pytest.raises(ValueError, match="one step size a factor"):
        Autograd(work.problem, work.factors, [torch.ones(1, 1, 1)] * 3, 0.0)


def test_sparse_workload_holds_the_entries_of_one_low_rank_matrix():
    work = workloads.sparse_completion(40, entries=700, width=4, **CPU)
    seen = work.problem.seen
    dense = torch.full((40, 40), math.nan, dtype=torch.float64)
    dense[seen.rows.lines(), seen.rows.indices.long()] = seen.rows.values
    block = [(rows, columns) for rows in range(37) for columns in range(37)][::37]
    minors = [dense[r : r + 3, c : c + 3] for r, c in block]
    full = [minor for minor in minors if torch.isfinite(minor).all()]
    assert len(seen) == 700 and all(torch.linalg.det(minor).abs() < 1e-9 for minor in full)
    assert [tuple(factor.shape) for factor in work.factors] == [(4, 40), (4, 4), (40, 4)]


@pytest.mark.parametrize("name", engines.ENGINES)
def test_every_engine_is_timed_or_says_why_not(name):
    for work in (_small(stack=2), workloads.sparse_completion(30, entries=90, width=4, **CPU)):
        timing = engines.time_engine(name, work, every=4, seconds=0.01, trials=3)
        if timing.skipped:
            assert name not in ("auto", "autograd", "reference")  # which take everything
            assert len(timing.skipped) > 15 and not len(timing.step)
        else:
            assert timing.step.shape == (3,) and (timing.step > 0).all()
            assert timing.setup >= 0 and timing.compilation >= 0 and timing.engine
        keys = engines.rows({name: timing}, [name])
        assert set(keys) == (
            {f"{name}/skipped"} if timing.skipped
            else {f"{name}/{key}" for key in ("step", "setup", "compilation", "memory", "engine")}
        )  # fmt: skip


def test_loading_takes_its_time():
    assert engines.load_engines("cpu") > 0


def test_an_engine_that_breaks_loses_none_of_the_others(monkeypatch):
    def breaks(*_):
        raise RuntimeError("out of memory\nand a long trace")

    monkeypatch.setattr(Reference, "advance", breaks)
    monkeypatch.setattr(Autograd, "until", breaks)
    monkeypatch.setattr(engines, "SOLVERS", ("auto", "autograd", "reference"))
    monkeypatch.setattr(engines, "recording_share", breaks)
    found = engines.survey(_small(), every=5, steps=20, tolerance=1e-3, seconds=0.004, trials=2)
    assert found["reference/skipped"] == "failed: RuntimeError: out of memory" == found["unrecorded"]
    assert found["autograd/unsolved"] == "failed: RuntimeError: out of memory" and found["autograd/step"] > 0
    assert found["auto/iterations"] == 20 and "reference/total" not in found and "recording" not in found


def test_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="engine is 'warp'"):
        engines.time_engine("warp", _small(), 4, 0.01, 2)


def test_timing_leaves_the_start_as_it_was():
    work = _small()
    before = [factor.clone() for factor in work.factors]
    for name in ("autograd", "reference", "auto"):
        engines.time_engine(name, work, every=4, seconds=0.01, trials=2)
    assert all(torch.equal(one, other) for one, other in zip(work.factors, before, strict=True))


def test_solutions_agree_on_the_iterations():
    work = _small()
    found = {name: engines.solve(name, work, 3000, 20, 1e-4) for name in ("auto", "reference", "autograd")}
    counts = [solution.iterations for solution in found.values()]
    assert max(counts) - min(counts) <= 20  # a loss at the tolerance may take one more record
    assert all(solution.loss < 1e-4 for solution in found.values())
    together = [solution for solution in found.values() if solution.iterations == found["auto"].iterations]
    assert all(solution.error == pytest.approx(found["auto"].error, rel=1e-4) for solution in together)
    assert 0 < found["auto"].iterations < 3000
    assert all(0 < solution.descent <= solution.total for solution in found.values())


def test_survey_gives_plain_values_and_a_row_of_trials():
    work = _small(stack=2)
    found = engines.survey(work, every=5, steps=20, tolerance=1e-3, seconds=0.004, trials=2)
    assert found["operations"] == work.work.operations and found["stack"] == 2 and "recording" not in found
    assert found["auto/steps"].shape == (2,) and found["auto/iterations"] == 20 == found["reference/iterations"]
    one = engines.survey(_small(dtype=torch.float32), every=5, steps=20, tolerance=1e-3, seconds=0.004, trials=2)
    assert "auto/total" not in one and one["reference/step"] > 0


def test_ceilings_name_every_precision():
    found = roofline.ceilings("cpu", ["float64", "float32"], 16, seconds=0.002, trials=2)
    assert set(found) == {"bytes/s", "launch"} | {
        f"{precision}/{key}" for precision in ("float64", "float32") for key in ("gemm", "gemm of d")
    }
    assert all(value > 0 for value in found.values())


def test_recording_share_is_a_number_a_trial():
    shares = engines.recording_share(_small(), step=1e-4, every=10, seconds=0.01, trials=3)
    assert shares.shape == (3,) and np.isfinite(shares).all() and (shares > -1).all()


def test_peak_inside_keeps_the_peak_of_the_whole():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    devices.reset_peak_memory(device)
    torch.empty(2**22, dtype=torch.uint8, device=device)
    whole = devices.peak_memory(device)
    with devices.peak_inside(device) as peak:
        torch.empty(2**20, dtype=torch.uint8, device=device)
        inside = peak()
    assert devices.peak_memory(device) >= whole > 0
    assert inside < whole if device == "cuda" else inside >= whole


def test_held_bytes_count_every_array_once():
    problem = cd.SparseCompletion(cd.sparse_low_rank((40, 30), 2, 600, torch.Generator().manual_seed(0), hidden=1)[0])
    factors = cd.orthogonal_factors((40, 30), 3, 4)
    own = 600 * (4 + 8) * 2 + 600 * 8 + 4 * (41 + 31)
    assert scaling.held_bytes(problem, factors) == own + 2 * 8 * (40 * 4 + 16 + 30 * 4)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    ],
)
def test_curves_have_a_value_for_each_count_and_trial(device):
    seconds, size = scaling.cost_curve([200, 400], 10, 4, 3, device)
    assert seconds.shape == (3, 2) and (seconds > 0).all() and size.shape == (2,) and (size > 0).all()


def test_slopes_of_powers_are_their_exponents():
    x = np.array([1.0, 10.0, 300.0])
    np.testing.assert_allclose(scaling.log_slope(x, np.stack([3 * x, x**2])), [1, 2])
    with pytest.raises(ValueError, match="at least two"):
        scaling.log_slope([1.0], np.ones(1))
