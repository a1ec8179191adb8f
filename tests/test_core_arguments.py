"""Every argument of the public core, one odd value at a time: taken, or refused by its name and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn

import compressible as cd
from compressible.networks import models, training
from compressible.recovery import als, spectra
from compressible.recovery.dropout import DropoutFactorization
from compressible.recovery.theory import invariants

DOUBLE = torch.float64
ODD: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "text": lambda: "1",
    "three": lambda: 3,
    "numpy's three": lambda: np.int64(3),
    "negative": lambda: -1,
    "zero": lambda: 0,
    "fraction": lambda: 2.5,
    "numpy's half": lambda: np.float32(0.5),
    "nan": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "complex": lambda: 1j,
    "true": lambda: True,
    "numpy's true": lambda: np.bool_(True),
    "huge": lambda: 10**400,  # no float, and more digits than many a text
    "empty list": list,
    "list": lambda: [1],
    "floats": lambda: [[1.0], [2.0, 3.0]],
    "dict": dict,
    "object": object,
    "class": lambda: torch.Generator,
    "function": lambda: lambda *given, **named: None,
    "generator": lambda: torch.Generator().manual_seed(0),
    "array": lambda: np.ones((6, 5)),
    "array of one": lambda: np.array(1.0),
    "half precision": lambda: torch.ones(6, 5).half(),
    "single precision": lambda: torch.ones(6, 5),
    "integers": lambda: torch.ones(6, 5, dtype=torch.int64),
    "truths": lambda: torch.ones(2, dtype=torch.bool),
    "complex tensor": lambda: torch.ones(6, 5, dtype=torch.complex128),
    "sparse": lambda: torch.eye(6, 5, dtype=DOUBLE).to_sparse(),
    "meta": lambda: torch.ones(6, 5, dtype=DOUBLE, device="meta"),
    "number tensor": lambda: torch.tensor(2.0, dtype=DOUBLE),
    "no entry": lambda: torch.empty(0, dtype=DOUBLE),
    "vector": lambda: torch.ones(2, dtype=DOUBLE),
    "other shape": lambda: torch.ones(3, 7, dtype=DOUBLE),
    "not finite": lambda: torch.full((6, 5), torch.nan, dtype=DOUBLE),
    "float16": lambda: torch.float16,
    "complex64": lambda: torch.complex64,
    "meta device": lambda: "meta",
    "factors of other kinds": lambda: [torch.ones(3, 5, dtype=DOUBLE), torch.ones(6, 3)],
    "factors and an array": lambda: [torch.ones(3, 5), np.ones((6, 3))],
    "sparse factors": lambda: [torch.ones(3, 5).to_sparse(), torch.ones(6, 3).to_sparse()],
    "whole factors": lambda: [torch.ones(3, 5, dtype=torch.int64), torch.ones(6, 3, dtype=torch.int64)],
}
INTEGER = {"three", "numpy's three"}
POSITIVE = {*INTEGER, "fraction", "numpy's half"}
NOT_NEGATIVE = {*POSITIVE, "zero"}
RATE = {*POSITIVE, "number tensor"}
STEP = {*RATE, "half precision", "single precision", "integers", "vector", "other shape"}  # they broadcast with ()
SIZES = {"list"}
FROM: dict[str, set[str]] = {"generator": {"none", "generator"}, "dtype": set()}
DRAW = {**FROM, "device": {"none"}}
STACK = {"batch_shape": {"list", "empty list"}, **DRAW}
VALUES = {"half precision", "single precision", "integers", "vector", "other shape", "not finite"}
FLOATS = VALUES - {"integers"}


@cache
def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def target() -> Tensor:
    return cd.low_rank_target((6, 5), 2, generator=seeded())


@cache
def mask() -> Tensor:
    return cd.random_mask((6, 5), 0.6, generator=seeded(1))


@cache
def problem() -> cd.MatrixCompletion:
    return cd.MatrixCompletion(target(), mask())


@cache
def sparse() -> cd.SparseCompletion:
    return cd.SparseCompletion(observed())


def off_diagonal() -> Tensor:
    """Entries apart from those of the sparse value in `ODD`."""
    return (target() * (1 - torch.eye(6, 5))).to_sparse()


def observed() -> Any:
    return scipy.sparse.coo_array((target() * mask()).numpy())


@cache
def small() -> list[Tensor]:
    return cd.compress_spectral(problem(), 3, scale=0.3)


@cache
def history() -> cd.History:
    return cd.descend(problem(), small(), 0.1, 5, record_every=5)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def build(generator: torch.Generator) -> Any:
    made = cd.MatrixFactorization(cd.low_rank_target((6, 6), 1, generator=generator))
    return made, {"small": (cd.compress_spectral(made, 2), 2.0, 1.0)}


def pixels() -> training.Examples:
    return training.Examples(torch.eye(4), torch.tensor([0, 1, 0, 1]))


def basis(columns: int = 2) -> Tensor:
    return torch.eye(6, columns, dtype=DOUBLE)


# function, the arguments that it is called with, and of each argument which odd values it takes
CORE: dict[str, tuple[Callable[..., Any], dict[str, Callable[[], Any]], dict[str, set[str]]]] = {
    "MatrixCompletion": (
        cd.MatrixCompletion,
        {"target": target, "mask": mask},
        {
            "target": {"single precision"},
            "mask": {"half precision", "single precision", "integers"},
            "mean_over": set(),
        },
    ),
    "MatrixFactorization": (
        cd.MatrixFactorization,
        {"target": target},
        {"target": {"single precision", "other shape"}},
    ),
    "MatrixSensing": (
        cd.MatrixSensing,
        {"operators": lambda: torch.ones(7, 6, 5, dtype=DOUBLE), "measurements": lambda: torch.ones(7, dtype=DOUBLE)},
        {"operators": set(), "measurements": {"other shape"}, "target": {"none", "single precision"}},
    ),
    "SparseCompletion": (
        cd.SparseCompletion,
        {"observed": off_diagonal},
        {"observed": {"sparse"}, "hidden": {"none", "sparse"}, "dtype": {"none"}, "device": {"none"}},
    ),
    "stack_problems": (cd.stack_problems, {"problems": lambda: [problem()] * 2}, {"problems": set()}),
    "low_rank_target": (
        cd.low_rank_target,
        {"shape": lambda: (6, 5), "rank": lambda: 2},
        {"shape": set(), "rank": INTEGER, **STACK},
    ),
    "random_mask": (
        cd.random_mask,
        {"shape": lambda: (6, 5), "observed": lambda: 0.5},
        {
            "shape": set(),
            "observed": {"numpy's half"},
            **STACK,
            "dtype": {"float16"},
            "weights": {"none", "half precision", "single precision", "integers"},
        },
    ),
    "sparse_low_rank": (
        cd.sparse_low_rank,
        {"shape": lambda: (40, 50), "rank": lambda: 2, "count": lambda: 30},
        {"shape": set(), "rank": INTEGER, "count": INTEGER, "hidden": {*INTEGER, "none"}, **FROM},
    ),
    "gaussian_operators": (
        cd.gaussian_operators,
        {"count": lambda: 7, "shape": lambda: (6, 5)},
        {"count": INTEGER, "shape": set(), **DRAW},
    ),
    "orthogonal_factors": (
        cd.orthogonal_factors,
        {"shape": lambda: (6, 5)},
        {
            "shape": set(),
            "depth": INTEGER,
            "width": {*INTEGER, "none"},
            "scale": POSITIVE,
            **STACK,
            "dtype": {"float16"},
        },
    ),
    "product": (cd.product, {"factors": small}, {"factors": {"whole factors"}}),
    "stack_factors": (cd.stack_factors, {"runs": lambda: [small()] * 2}, {"runs": set()}),
    "compress_from_gradient": (
        cd.compress_from_gradient,
        {
            "problem": lambda: cd.MatrixFactorization(torch.eye(6, dtype=DOUBLE)),
            "factors": lambda: cd.orthogonal_factors((6, 6)),
            "rank": lambda: 2,
        },
        {"problem": set(), "factors": set(), "rank": INTEGER},
    ),
    "compress_spectral": (
        cd.compress_spectral,
        {"problem": problem, "width": lambda: 3},
        {
            "problem": set(),
            "width": INTEGER,
            "depth": INTEGER,
            "scale": POSITIVE,
            "surrogate": {"none", "single precision"},
            "rank": {"none"},
        },
    ),
    "descend": (
        cd.descend,
        {"problem": problem, "factors": small, "step_size": lambda: 1e-3, "steps": lambda: 2},
        {
            "problem": set(),
            "factors": set(),
            "step_size": STEP,
            "steps": {*INTEGER, "zero"},
            "outer_ratio": {*STEP, "zero"},
            "weight_decay": {*RATE, "zero"},
            "record_every": {*INTEGER, "huge"},
            "tolerance": {*RATE, "zero"},
            "snapshots": {"empty list", "list", "no entry"},
            "engine": set(),
            "show_progress": {"none", "true", "numpy's true"},
        },
    ),
    "descend with entries alone": (
        cd.descend,
        {"problem": sparse, "factors": small, "step_size": lambda: 1e-3, "steps": lambda: 2},
        {"factors": set(), "step_size": RATE, "outer_ratio": {*RATE, "zero"}, "engine": set()},
    ),
    "iterations_to": (
        lambda **given: history().iterations_to(**given),
        {"level": lambda: 0.1},
        {"level": {*NOT_NEGATIVE, "negative"}, "curve": set()},
    ),
    "final": (lambda **given: history().final(**given), {}, {"curve": set()}),
    "rho": (
        invariants.rho,
        {"scales": lambda: [0.1, 0.1], "step_size": lambda: 0.1, "steps": lambda: 5},
        {
            "scales": {"list", "vector"},
            "step_size": POSITIVE,
            "steps": {*INTEGER, "zero"},
            "weight_decay": NOT_NEGATIVE,
        },
    ),
    "over_ranked_law": (
        invariants.over_ranked_law,
        {
            "excess": lambda: 2,
            "dimension": lambda: 6,
            "scale": lambda: 0.5,
            "step_size": lambda: 0.1,
            "iterations": lambda: np.array([0, 5]),
        },
        {
            "excess": {*INTEGER, "zero"},
            "dimension": INTEGER,
            "scale": POSITIVE,
            "step_size": POSITIVE,
            "iterations": {"list"},
        },
    ),
    "compression_gap": (
        invariants.compression_gap,
        {"rhos": lambda: torch.ones(3, 2), "size": lambda: 6, "rank": lambda: 1},
        {"rhos": FLOATS, "size": INTEGER, "rank": {*INTEGER, "zero"}},
    ),
    "outer_ratio_limit": (
        invariants.outer_ratio_limit,
        {"problem": problem, "step_size": lambda: 0.1, "depth": lambda: 3},
        {"problem": set(), "step_size": STEP, "depth": INTEGER},
    ),
    "escape_time": (
        invariants.escape_time,
        {"value": lambda: 1.0, "depth": lambda: 3, "scale": lambda: 0.1, "step_size": lambda: 0.1},
        {"value": POSITIVE, "depth": INTEGER, "scale": {"numpy's half"}, "step_size": POSITIVE},
    ),
    "aligned_values": (
        invariants.aligned_values,
        {
            "values": lambda: torch.ones(3),
            "depth": lambda: 3,
            "scale": lambda: 0.1,
            "step_size": lambda: 0.1,
            "steps": lambda: 5,
        },
        {
            "values": {*FLOATS, "number tensor"},
            "depth": INTEGER,
            "scale": POSITIVE,
            "step_size": POSITIVE,
            "steps": {*INTEGER, "zero"},
        },
    ),
    "svd_evolution": (
        spectra.svd_evolution,
        {"path": lambda: torch.eye(7, dtype=DOUBLE).expand(4, 7, 7), "rank": lambda: 2},
        {"path": set(), "rank": INTEGER, "reference": {*INTEGER, "zero"}},
    ),
    "principal_coordinates": (
        spectra.principal_coordinates,
        {"reference": lambda: torch.randn(6, 3, 3, generator=seeded(2))},
        {"reference": set(), "components": INTEGER},
    ),
    "principal_angles": (
        spectra.principal_angles,
        {"first": basis, "second": lambda: basis(3)},
        {"first": set(), "second": set()},
    ),
    "leading_angle": (
        spectra.leading_angle,
        {"first": target, "second": target, "first_rank": lambda: 2, "second_rank": lambda: 2},
        {"first": set(), "second": set(), "first_rank": INTEGER, "second_rank": INTEGER},
    ),
    "vector_angles": (spectra.vector_angles, {"first": basis, "second": basis}, {"first": set(), "second": set()}),
    "alignment": (spectra.alignment, {"first": basis, "second": basis}, {"first": set(), "second": set()}),
    "singular_values": (spectra.singular_values, {"matrix": target}, {"matrix": FLOATS - {"vector"}}),
    "leading_share": (
        spectra.leading_share,
        {"values": lambda: torch.ones(3), "count": lambda: 1},
        {"values": VALUES, "count": {*INTEGER, "huge"}, "power": POSITIVE},
    ),
    "effective_count": (spectra.effective_count, {"values": lambda: torch.ones(3)}, {"values": VALUES}),
    "stable_count": (spectra.stable_count, {"values": lambda: torch.ones(3)}, {"values": VALUES}),
    "effective_rank": (spectra.effective_rank, {"matrix": target}, {"matrix": {"single precision", "other shape"}}),
    "stable_rank": (spectra.stable_rank, {"matrix": target}, {"matrix": {"single precision", "other shape"}}),
    "alternate": (
        als.alternate,
        {"problem": sparse, "rank": lambda: 2, "sweeps": lambda: 2},
        {
            "problem": set(),
            "rank": INTEGER,
            "ridge": NOT_NEGATIVE,
            "sweeps": INTEGER,
            "generator": {"none", "generator"},
            "bias_ridge": NOT_NEGATIVE,
            "start": set(),
            "snapshots": {"empty list", "list", "no entry"},
            "weighted": {"true", "numpy's true"},
        },
    ),
    "DropoutFactorization": (
        DropoutFactorization,
        {"target": target, "keep": lambda: 0.5},
        {
            "target": {"single precision", "other shape"},
            "keep": {
                *("numpy's half", "list", "array", "array of one"),  # as torch.as_tensor takes them
                *("half precision", "single precision", "integers", "vector", "other shape"),
            },
        },
    ),
    "FactoredLinear": (cd.FactoredLinear, {"factors": small}, {"factors": set(), "bias": {"none"}}),
    "FactoredConv2d": (
        cd.FactoredConv2d,
        {"factors": lambda: [torch.ones(3, 9), torch.ones(6, 3)], "kernel_size": lambda: (3, 3)},
        {
            "factors": set(),
            "kernel_size": set(),
            "stride": INTEGER,
            "padding": {*INTEGER, "zero"},
            "dilation": INTEGER,
            "bias": {"none"},
        },
    ),
    "factorize": (
        cd.factorize,
        {"model": network, "target_modules": lambda: ["0"], "width": lambda: 2},
        {
            "model": set(),
            "target_modules": set(),
            "variant": set(),
            "width": INTEGER,
            "depth": INTEGER,
            "init_scale": POSITIVE,
            "start": set(),
            "loss_step": {"none", "function"},
            "generator": {"none", "generator"},
        },
    ),
    "compare_starts": (
        cd.compare_starts,
        {"build": lambda: build, "seed": lambda: 0, "seeds": lambda: 1, "steps": lambda: 2},
        {"build": set(), "seed": {*INTEGER, "zero"}, "seeds": INTEGER},
    ),
    "stack_starts": (
        cd.stack_starts,
        {"build": lambda: build, "seed": lambda: 0, "seeds": lambda: 1, "steps": lambda: 2, "engine": lambda: "fused"},
        {"build": set(), "seed": {*INTEGER, "zero"}, "seeds": INTEGER},
    ),
    "Examples": (
        training.Examples,
        {"inputs": lambda: torch.eye(4), "targets": lambda: torch.zeros(4)},
        {"inputs": set(), "targets": set()},
    ),
    "train": (
        training.train,
        {
            "models": lambda: [models.seeded(0, models.mlp, 4, 8, 2)],
            "train_set": pixels,
            "learning_rates": lambda: [0.02],
            "steps": lambda: 2,
        },
        {
            "models": set(),
            "train_set": set(),
            "learning_rates": {"list"},
            "steps": INTEGER,
            "test_set": {"none"},
            "batch_size": {"none", *INTEGER},
            "optimizer": set(),
            "momentum": {"zero", "numpy's half"},
            "schedule": set(),
            "seed": {"zero", "list", *INTEGER},
            "augment": {"none"},
            "evaluate_every": {"none", "huge", *INTEGER},
            "snapshots": {"list", "empty list"},
            "snapshot_of": {"none", "empty list"},
            "watch": {"none", "function"},
            "stacked": {"true"},
            "device": set(),
        },
    ),
}
ALSO = {  # where one value is of another's size, the message may name the other
    "factors": ("W_1", "W_2"),
    "target": ("mask",),
    "shape": ("rank",),
    "observed": ("hidden",),
    "width": ("rank",),
    "target_modules": ("layer",),
    "inputs": ("targets",),
    "reference": ("components",),
}
CASES = [(name, argument) for name, (_, _, taken) in CORE.items() for argument in taken]


def outcome(call: Callable[[], Any], argument: str, taken: bool) -> str:
    """What is wrong about a call, or nothing."""
    told = (argument, *ALSO.get(argument, ()))
    try:
        call()
    except (ValueError, TypeError) as error:
        message = str(error)
        by_name = any(name in message for name in told) and len(message) < 1500
        wanted = any(word in message for word in ("expected", "known are", "the closest is"))
        return "" if by_name and wanted and not taken else f"{type(error).__name__}: {message[:200]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "" if taken else "taken"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "argument"), CASES, ids=[f"{name}-{argument}" for name, argument in CASES])
def test_an_odd_value_is_taken_or_refused_by_name(name, argument):
    function, given, takes = CORE[name]
    wrong = {}
    for label, make in ODD.items():
        arguments = {**{key: value() for key, value in given.items()}, argument: make()}
        found = outcome(lambda arguments=arguments: function(**arguments), argument, label in takes[argument])
        wrong |= {label: found} if found else {}
    assert not wrong


def test_every_function_is_called_with_what_it_takes():
    for function, given, _ in CORE.values():
        function(**{key: value() for key, value in given.items()})
