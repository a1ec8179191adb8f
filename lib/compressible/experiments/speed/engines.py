"""How fast an engine takes its steps: set-up, compilation and steady state apart, and seconds to a tolerance.

Names are those of `descend`'s engines and of the peers that they are measured against, "autograd" and "jax".
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from compressible.descent.engines.base import Engine
from compressible.descent.engines.choose import NAMES, choose, few_threads
from compressible.descent.gradient_descent import descend
from compressible.descent.history import History
from compressible.experiments.speed.peers import Autograd, Jax, Peer
from compressible.experiments.speed.roofline import time_calls
from compressible.experiments.speed.workloads import Workload, completion
from compressible.runtime import devices

PEERS: dict[str, type[Peer]] = {"jax": Jax, "autograd": Autograd}
ENGINES = ("auto", *PEERS, *(name for name in NAMES if name != "auto"))  # first bears what is compiled first
BASELINES = ("jax", "autograd", "reference")  # plain loops that `auto` is compared with
SOLVERS = ("auto", "jax", "reference")  # which run to the tolerance


@dataclass
class Timing:
    """Seconds of one engine on one workload; `skipped` says why there are none.

    setup: copies and buffers; compilation: what has to be compiled or captured first, with caches on disk as they
    were; step: one gradient step of all problems, in each of the trials (T,); memory: peak bytes of all tensors on a
    CUDA device, the problem included, 0 elsewhere; engine: what "auto" stood for.
    """

    setup: float = float("nan")
    compilation: float = float("nan")
    step: np.ndarray = field(default_factory=lambda: np.empty(0))
    memory: int = 0
    engine: str = ""
    skipped: str = ""


@dataclass
class Solution:
    """Seconds to a tolerance, records included: all of them, the descent's alone, and its iterations.

    loss and error: the largest of the stack at the end, so that a loss not reached and an interpolant that misses the
    unobserved entries are seen.
    """

    total: float
    descent: float
    iterations: int
    loss: float
    error: float


def time_engine(name: str, workload: Workload, every: int, seconds: float, trials: int) -> Timing:
    """Time the engine `name` of `ENGINES` on a workload for about `seconds`, in stretches of `every` steps.

    Raises ValueError for an unknown name; an engine that cannot take the workload is skipped with its reason, one that
    breaks on the way (no memory, a compiler's error) likewise, so that the others are not lost.
    """
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}, expected one of {', '.join(ENGINES)}")
    try:
        return _time(name, workload, every, seconds, trials)
    except (ValueError, ImportError) as refusal:
        return Timing(skipped=str(refusal))
    except Exception as failure:
        return Timing(skipped=failed(failure))


def failed(error: Exception) -> str:
    """Return one line on an error that is no refusal."""
    return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _time(name: str, workload: Workload, every: int, seconds: float, trials: int) -> Timing:
    device = str(workload.problem.device)
    if device != "cpu":
        gc.collect()  # an engine whose calls are bound to itself holds memory until then
    with devices.peak_inside(device) as peak, few_threads(workload.problem, workload.stack):
        began = time.perf_counter()
        engine = _build(name, workload)
        wait = _waiting(engine, device)
        wait()
        ready = time.perf_counter()
        engine.prepare(every)
        wait()
        compiled = time.perf_counter()
        step = _steady(engine, wait, every, seconds, trials)
        memory = peak() if device != "cpu" else 0
        return Timing(ready - began, compiled - ready, step, memory, engine.name)


def survey(
    workload: Workload, every: int, steps: int, tolerance: float, seconds: float, trials: int
) -> dict[str, float | str | np.ndarray]:
    """Time all engines on a workload and return what `rows` does, with "<engine>/steps" (T,), the trials' seconds.

    With "operations", "bytes" and "stack"; where the workload is compressed and float64, with what `solve` finds for
    `SOLVERS`, as "<engine>/total", "/descent", "/iterations", "/loss", "/error"; of one such problem, with "recording"
    (T,). What breaks is left out, and "<engine>/unsolved" or "unrecorded" says why.
    """
    timings = {name: time_engine(name, workload, every, seconds, trials) for name in ENGINES}
    out: dict = rows(timings) | asdict(workload.work) | {"stack": workload.stack}
    ran = {name: timing for name, timing in timings.items() if not timing.skipped}
    out |= {f"{name}/steps": timing.step for name, timing in ran.items()}
    if "compressed float64" not in workload.name:
        return out
    for name in [name for name in SOLVERS if name in ran]:
        try:
            found = asdict(solve(name, workload, steps, every, tolerance))
        except Exception as error:
            found = {"unsolved": failed(error)}
        out |= {f"{name}/{key}": value for key, value in found.items()}
    return out | _recording(workload, ran, every, seconds, trials)


def _recording(workload: Workload, ran: dict[str, Timing], every: int, seconds: float, trials: int) -> dict:
    if workload.stack > 1 or "auto" not in ran:
        return {}
    try:
        step = float(np.median(ran["auto"].step))
        return {"recording": recording_share(workload, step, every, seconds, trials)}
    except Exception as error:
        return {"unrecorded": failed(error)}


def load_engines(device: str) -> float:
    """Load the libraries of all engines, by making each on a tiny problem, and return the seconds that it took.

    Nothing is compiled; what is timed afterwards is free of imports and of waking the device.
    """
    began = time.perf_counter()
    tiny = completion(8, 1, 0.5, torch.float64, device, seed=0)
    for name in ENGINES:
        with suppress(Exception):  # which the first measurement of that engine meets again, and reports
            _build(name, tiny)
    devices.synchronize(device)
    return time.perf_counter() - began


def solve(name: str, workload: Workload, steps: int, every: int, tolerance: float) -> Solution:
    """Run the engine `name` until every training loss is below `tolerance`, at most `steps`, records every `every`.

    What can be compiled is compiled before the clock starts, by a first call; set-up is in the total. Raises ValueError
    where the engine cannot take the workload.
    """
    if name in PEERS:
        return _solve_by_peer(PEERS[name], workload, steps, every, tolerance)

    def run(steps: int, tolerance: float) -> History:
        history = descend(
            workload.problem,
            workload.factors,
            workload.step_size,
            steps,
            workload.outer_ratio,
            record_every=every,
            tolerance=tolerance,
            engine=name,
            show_progress=False,
        )
        devices.synchronize(str(workload.problem.device))
        return history

    run(2 * every, 0.0)
    began = time.perf_counter()
    history = run(steps, tolerance)
    total = time.perf_counter() - began
    loss, error = (float(history.final(curve).max()) for curve in ("loss", "error"))
    return Solution(total, float(history.seconds[-1]), int(history.stopped.max()), loss, error)


def _solve_by_peer(kind: type[Peer], workload: Workload, steps: int, every: int, tolerance: float) -> Solution:
    peer = kind(workload.problem, workload.factors, workload.rates, 0.0)
    peer.until(steps, every, float("inf"))  # compiles, and stops at once
    began = time.perf_counter()
    iterations = peer.until(steps, every, tolerance)
    peer.wait()
    total = time.perf_counter() - began
    loss, error = peer.evaluate().reshape(-1, 2).amax(0).tolist()
    return Solution(total, total, iterations, loss, error)


def recording_share(
    workload: Workload, step: float, every: int, seconds: float, trials: int, engine: str = "auto"
) -> np.ndarray:
    """Return the share of time that records every `every` steps add to steps without any, by trial (trials,).

    Each run is as long as `seconds` allow at `step` seconds a step, four records at least. Runs with and without take
    turns, so that a machine that slows down slows down both.
    """
    steps = every * max(4, round(seconds / (every * step)))

    def timed(record_every: int) -> float:
        start = workload.factors, workload.step_size, steps, workload.outer_ratio
        history = descend(workload.problem, *start, record_every=record_every, engine=engine, show_progress=False)
        return float(history.seconds[-1])

    pairs = [(timed(every), timed(steps)) for _ in range(trials + 1)][1:]
    return np.array([often / never - 1 for often, never in pairs])


def _build(name: str, workload: Workload) -> Engine:
    kind = PEERS[name] if name in PEERS else choose(name, workload.problem, workload.factors)
    return kind(workload.problem, workload.factors, workload.rates, 0.0)


def _waiting(engine: Engine, device: str) -> Callable[[], None]:
    return engine.wait if isinstance(engine, Peer) else lambda: devices.synchronize(device)


def _steady(engine: Engine, wait: Callable[[], None], every: int, seconds: float, trials: int) -> np.ndarray:
    """Seconds a step in each trial; stretches are shorter than `every` where a single step is long."""
    plain = isinstance(engine, Autograd)
    with nullcontext() if plain else torch.inference_mode():
        length = every
        if not isinstance(engine, Jax):  # whose other lengths would have to be compiled
            once = float(np.median(time_calls(lambda: engine.advance(1), wait, 0.0, 1)))
            length = min(every, max(1, int(seconds / trials / once)))
        return time_calls(lambda: engine.advance(length), wait, seconds, trials) / length


def rows(timings: dict[str, Timing], names: Sequence[str] = ENGINES) -> dict[str, float | str]:
    """Return plain values of the timings of one workload, keys "<engine>/setup", "/compilation", "/memory", ...

    "<engine>/step" is the median; skipped engines have "<engine>/skipped" alone.
    """
    out: dict[str, float | str] = {}
    for name in names:
        values = asdict(timings[name])
        if reason := values.pop("skipped"):
            values = {"skipped": reason}
        else:
            values["step"] = float(np.median(values["step"]))
        out |= {f"{name}/{key}": value for key, value in values.items()}
    return out
