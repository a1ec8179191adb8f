"""Iterations per second of `descend` on this machine, and what recording costs. Nothing is asserted.

    OMP_NUM_THREADS=1 python benchmarks/descent.py

P2's completion problem (d = 100, r = 5, 30 % observed, float64): compressed (width 10) and original (width 100), one
problem and a stack of 20. Rates are the best of the repeats, engines taking turns, since a shared machine only ever
adds time; a ratio compares runs of one call.
"""

from __future__ import annotations

import json

import torch

import compressible as cd

SIZE, RANK, STACK, REPEATS = 100, 5, 20, 8


def problems(batch: tuple[int, ...]):
    """The completion problem with its wide and compressed starts, stacked over `batch`."""
    generator, shape = torch.Generator().manual_seed(0), (SIZE, SIZE)
    target = cd.low_rank_target(shape, RANK, batch, generator)
    problem = cd.MatrixCompletion(target, cd.random_mask(shape, 0.3, batch, generator))
    wide = cd.orthogonal_factors(shape, 3, None, 1e-2, generator, batch_shape=batch)
    return problem, {"compressed": (cd.compress_spectral(problem, 2 * RANK), 5.0), "original": (wide, 1.0)}


def seconds(problem, factors, ratio: float, steps: int, engine: str, every: int = 50) -> float:
    """Wall seconds of one descent, set-up left out."""
    history = cd.descend(problem, factors, 10.0, steps, outer_ratio=ratio, record_every=every, engine=engine)
    return float(history.seconds[-1])


def rates(batch: tuple[int, ...], engines: tuple[str, ...], steps: dict[str, int]) -> dict[str, float]:
    """Problem-iterations per second for each network and engine."""
    problem, starts = problems(batch)
    times: dict[str, list[float]] = {}
    for _ in range(REPEATS + 1):
        for name, (factors, ratio) in starts.items():
            for engine in engines:
                spent = seconds(problem, factors, ratio, steps[name], engine)
                times.setdefault(f"{name}, {engine}", []).append(spent)
    count = max(1, sum(batch))
    return {key: count * steps[key.split(",")[0]] / min(spent[1:]) for key, spent in times.items()}


def recording(steps: int = 5_000) -> float:
    """Share of the time that a record (losses, tolerance test) every 50 iterations costs, from the best of each."""
    problem, starts = problems(())
    factors, ratio = starts["compressed"]
    often, never = [], []
    for _ in range(8 * REPEATS):
        often.append(seconds(problem, factors, ratio, steps, "auto"))
        never.append(seconds(problem, factors, ratio, steps, "auto", every=steps))
    return min(often) / min(never) - 1


def main() -> None:
    """Print one JSON line."""
    one = rates((), ("auto", "compiled", "reference"), {"compressed": 10_000, "original": 1_500})
    many = rates((STACK,), ("auto", "fused"), {"compressed": 2_000, "original": 150})
    gains = {name: many[f"{name}, auto"] / one[f"{name}, auto"] for name in ("compressed", "original")}
    result = {
        "one problem, iterations/s": {key: round(value) for key, value in one.items()},
        f"{STACK} problems, problem-iterations/s": {key: round(value) for key, value in many.items()},
        "stack over single": {key: round(value, 2) for key, value in gains.items()},
        "recording every 50, share of time": round(recording(), 4),
        "threads of torch": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
