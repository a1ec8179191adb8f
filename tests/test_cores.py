"""The engines on the CPU in processes as hosts have them: forked, threaded, read-only, told how many cores to take."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import compressible as cd

pytest.importorskip("numba")
pytest.importorskip("scipy")

from threadpoolctl import ThreadpoolController

from compressible.descent.engines.cores import cores, one_blas_thread

SPARSE, STACK = "sparse_numba", "compiled"


def _run(engine: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if engine == SPARSE:
        problem = cd.SparseCompletion(*cd.sparse_low_rank((40, 30), 2, 300, generator))
        history = cd.descend(problem, cd.orthogonal_factors((40, 30), 3, 4, 0.5, generator), 1.0, 20)
    else:
        problem = cd.MatrixFactorization(cd.low_rank_target((9, 7), 2, (3,), generator))
        starts = cd.orthogonal_factors((9, 7), 3, scale=0.5, generator=generator, batch_shape=(3,))
        history = cd.descend(problem, starts, 1.0, 20)
    assert history.engine == engine
    return history.loss


def _send(engine: str, pipe) -> None:
    pipe.send(_run(engine).numpy())


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("engine", [SPARSE, STACK])
def test_a_forked_child_descends_like_its_parent(engine, monkeypatch):
    """A pool of threads was cached in the parent, and its threads are not in the child."""
    monkeypatch.setenv("COMPRESSIBLE_THREADS", "2")
    expected, (receiver, sender) = _run(engine).numpy(), multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_send, args=(engine, sender))
    child.start()
    done = receiver.poll(60)
    if not done:
        child.kill()
    child.join(60)
    assert done, "the child waits for threads that it does not have"
    assert np.array_equal(receiver.recv(), expected)


def _blas_threads() -> list[int]:
    return [library["num_threads"] for library in ThreadpoolController().info() if library["user_api"] == "blas"]


def test_blas_has_its_threads_back_after_descents_side_by_side():
    _run(STACK)
    two = ThreadpoolController()
    with two.limit(limits=2, user_api="blas"):
        before = _blas_threads()
        first, second = one_blas_thread(), one_blas_thread()
        first.__enter__()  # one comes in, another does, and the first goes first
        second.__enter__()
        first.__exit__(None, None, None)
        assert set(_blas_threads()) == {1}
        second.__exit__(None, None, None)
        assert _blas_threads() == before
        with ThreadPoolExecutor(4) as together:
            runs = list(together.map(_run, [STACK] * 12))
        assert _blas_threads() == before
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("told", ["abc", "-1", "1.5"])
def test_a_number_of_cores_that_is_none_is_named(told, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_THREADS", told)
    with pytest.raises(ValueError, match=f"COMPRESSIBLE_THREADS is '{told}', expected an integer >= 1"):
        _run(STACK)


@pytest.mark.parametrize("told", ["", " ", "0"])
def test_no_number_of_cores_means_all(told, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_THREADS", told)
    assert cores() == len(os.sched_getaffinity(0))


NO_PLACE = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
import sys; sys.path.insert(0, {tests!r})
import test_cores
for engine in (test_cores.SPARSE, test_cores.STACK):
    print(repr(float(test_cores._run(engine).sum())))
"""


def test_a_read_only_library_without_a_cache_compiles_anew():
    code = NO_PLACE.format(tests=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [repr(float(_run(engine).sum())) for engine in (SPARSE, STACK)]
