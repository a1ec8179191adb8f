"""What the mathematics refuses, by name and before any work: tensors, lists of factors, problems, types and devices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressible.runtime.checks import expect, expect_generator, expect_integer, expect_number

Dtypes = Sequence[torch.dtype]

PRECISIONS = (torch.float32, torch.float64)  # half types have no SVD, and lose what a descent has to tell apart
FLOATING = (*PRECISIONS, torch.float16, torch.bfloat16)
REAL = (*FLOATING, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LARGEST = 2**40  # entries of one array: eight terabytes of float64
DEEPEST = 10**5  # factors
MOST_RECORDS = 10**7  # values kept of a loop: more are a mistake, and a list of them would fill the memory first


def check_tensor(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a tensor; an array is told how to become one."""
    if isinstance(value, Tensor):
        return
    hint = " (torch.from_numpy makes one of an array)" if isinstance(value, np.ndarray) else ""
    expect(f"type of {name}", type(value).__name__, False, f"a torch tensor{hint}")


def expect_tensor(
    name: str, value: Any, expected: str, dtypes: Dtypes = PRECISIONS, dims: int = 0, filled: bool = True
) -> None:
    """Raise ValueError unless it is a dense tensor of numbers of one of the types, with `dims` dimensions at least.

    It looks at no entry, so that a GPU is not waited for. Unless `filled`, it may have none.
    """
    check_tensor(name, value)
    dense = value.layout is torch.strided and not value.is_meta and not value.is_nested
    if not dense or value.dtype not in dtypes or value.ndim < dims or (filled and value.numel() == 0):
        raise ValueError(f"{name} has {described(value)}, expected {expected}")


def described(tensor: Tensor) -> str:
    """Shape and type, and what else is odd about a tensor."""
    shape = "nested" if tensor.is_nested else tuple(tensor.shape)
    odd = f", {tensor.layout}" if tensor.layout is not torch.strided else ""
    return f"shape {shape} and dtype {tensor.dtype}{odd}{' on meta' if tensor.is_meta else ''}"


def expect_matrix(name: str, value: Any, dtypes: Dtypes = PRECISIONS) -> None:
    """Raise ValueError unless it is a non-empty (..., m, n) of one of the floating types."""
    told = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    expect_tensor(name, value, f"a non-empty floating-point (..., m, n) in {told}", dtypes, 2)


def expect_dtype(name: str, dtype: object, known: Dtypes = PRECISIONS) -> None:
    """Raise ValueError unless it is one of the types."""
    expect(name, dtype, isinstance(dtype, torch.dtype) and dtype in known, f"one of {', '.join(map(str, known))}")


def expect_device(device: Any) -> None:
    """Raise ValueError unless it is None or a device that holds numbers and is there."""
    if device is None or (isinstance(device, (str, torch.device)) and str(device) == "cpu"):
        return
    told = "cpu, a CUDA device that this PyTorch sees, or None"
    expect("device", device, isinstance(device, (str, int, torch.device)) and not isinstance(device, bool), told)
    try:
        there = not torch.empty(1, device=device).is_meta
    except (RuntimeError, AssertionError, ValueError, OverflowError):  # no such device, or none that this PyTorch sees
        there = False
    expect("device", device, there, told)


def expect_entries(names: str, sizes: Sequence[int], most: int = LARGEST) -> None:
    """Raise ValueError where an array of these sizes has more entries than any machine can hold."""
    expect(f"size by {names}", tuple(sizes), math.prod(sizes) <= most, f"at most {most:g} entries")


def expect_draw(sizes: Sequence[int], generator: Any, dtype: object, device: Any, dtypes: Dtypes = PRECISIONS) -> None:
    """Raise ValueError unless entries of these sizes, this type and on this device can be drawn by the generator."""
    expect_entries("batch_shape or count, and shape", sizes)
    expect_generator(generator)
    expect_dtype("dtype", dtype, dtypes)
    expect_device(device)


def expect_depth(depth: Any, least: int = 2) -> int:
    """Return the number of factors; ValueError unless it is an integer of at least `least`."""
    return expect_integer("depth", depth, least, DEEPEST, f"an integer >= {least} and <= {DEEPEST}")


def expect_scale(scale: Any, dtype: torch.dtype) -> float:
    """Return eps > 0; ValueError where matrices of that scale would be 0 or infinite in their type, or lose digits."""
    scale = expect_number("scale", scale, "a finite number > 0 (usually 1e-3 to 1)", above=0)
    limits = torch.finfo(dtype)
    told = f"a number from {limits.tiny:.2g} to {limits.max:.2g}, which {dtype} holds (usually 1e-3 to 1)"
    expect("scale", scale, limits.tiny <= scale <= limits.max, told)
    return scale


def expect_rate(name: str, value: Any, positive: bool = True, single: bool = False) -> Any:
    """Return a finite number, or unless `single` a tensor of them, > 0 or else >= 0; ValueError for another."""
    many = "" if single else ", or a tensor of such, one for each problem"
    told = f"finite {'>' if positive else '>='} 0: a number{many}"
    if not isinstance(value, Tensor):
        return expect_number(name, value, told, 0 if positive else -math.inf, 0)
    expect_tensor(name, value, told, REAL)
    inside = torch.isfinite(value) & (value > 0 if positive else value >= 0)
    expect(name, value, bool(inside.all()) and (value.ndim == 0 or not single), told)
    return value.detach().item() if single else value.detach()


def expect_problem(problem: Any, *methods: str, name: str = "problem") -> None:
    """Raise ValueError unless it has the shape and the methods of a recovery problem."""
    missing = [part for part in ("shape", "batch_shape", *methods) if not hasattr(problem, part)]
    without = f"; it has no {', '.join(missing)}" if missing else ""
    told = f"a recovery problem such as MatrixCompletion(target, mask){without}"
    expect(name, problem, not missing and not isinstance(problem, (type, Tensor)), told)


def expect_factors(
    factors: Any,
    name: str = "factors",
    dtypes: Dtypes | None = FLOATING,
    expected: str = "widths of neighbours to be equal",
) -> None:
    """Raise ValueError unless it is a list of dense matrices (..., w_l, w_{l-1}) of one type and device that chain.

    `dtypes` None is any but truth values.
    """
    of = "" if name == "factors" else f" of {name}"
    passing = isinstance(factors, (str, bytes, Mapping, Set, Iterator))  # an iterator would be used up
    odd = passing or hasattr(factors, "dtype") or not hasattr(factors, "__len__")  # a tensor, an array
    expect(f"type of {name}", type(factors).__name__, not odd, "a list [W_1, ..., W_L] of tensors")
    if not len(factors):
        raise ValueError(f"{name} are {factors!r}, expected at least one tensor")
    for layer, factor in enumerate(factors, 1):  # text is made where it is needed: small products are microseconds
        if not isinstance(factor, Tensor):
            check_tensor(f"W_{layer}{of}", factor)
        if factor.layout is not torch.strided or factor.is_nested or factor.ndim < 2 or factor.dtype is torch.bool:
            raise ValueError(f"W_{layer}{of} has {described(factor)}, expected a dense matrix (..., w, w)")
    kinds = {(factor.dtype, factor.device) for factor in factors}
    batches = [tuple(factor.shape[:-2]) for factor in factors]
    if len(kinds) != 1 or (dtypes is not None and factors[0].dtype not in dtypes):
        raise ValueError(f"{name} have kinds {sorted(map(str, kinds))}, expected one floating dtype on one device")
    sizes = [tuple(factor.shape[-2:]) for factor in factors]
    if not all(upper[1] == lower[0] for lower, upper in pairwise(sizes)):
        raise ValueError(f"{name} W_1..W_L have shapes {sizes}, expected {expected}")
    if any(batches):
        expect_one_batch({f"W_{layer}{of}": batch for layer, batch in enumerate(batches, 1)})


def expect_problems_factors(problem: Any, factors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the common batch shape; ValueError unless factors that chain have the problem's type and device."""
    mine = (factors[0].dtype, factors[0].device)
    kind = (getattr(problem, "dtype", mine[0]), getattr(problem, "device", mine[1]))
    expect("factors' kind", mine, mine == kind, f"the problem's {kind}")
    batches = {f"W_{layer}": tuple(factor.shape[:-2]) for layer, factor in enumerate(factors, 1)}
    return expect_one_batch({"problem": tuple(problem.batch_shape), **batches})


def expect_one_batch(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape to which named leading dimensions broadcast; ValueError, by the name, where one does not."""
    whole: tuple[int, ...] = ()
    for name, shape in shapes.items():
        if shape == whole:
            continue
        pairs = zip(reversed(whole), reversed(shape), strict=False)
        fits = all(one == other or 1 in (one, other) for one, other in pairs)
        expect(f"batch shape of {name}", shape, fits, f"one that broadcasts with {whole}")
        whole = tuple(torch.broadcast_shapes(whole, shape))
    return whole


def expect_measurements(operators: Tensor, measurements: Tensor, target: Tensor | None) -> tuple[int, ...]:
    """Return the common batch shape; ValueError unless measurements and target are of the operators' sizes and kind."""
    told = f"(..., {operators.shape[0]}) of the operators' {operators.dtype} on {operators.device}"
    expect_tensor("measurements", measurements, told, (operators.dtype,), 1)
    if measurements.shape[-1] != operators.shape[0] or measurements.device != operators.device:
        found = f"{tuple(measurements.shape)} on {measurements.device}"
        raise ValueError(f"measurements have shape {found}, expected {told}")
    batch = tuple(measurements.shape[:-1])
    if target is None:
        return batch
    expect_matrix("target", target)
    if target.shape[-2:] != operators.shape[1:]:
        expected = f"(..., m, n) with {tuple(operators.shape[1:])}"
        raise ValueError(f"target has shape {tuple(target.shape)}, expected {expected}")
    expect("device of target", target.device, target.device == operators.device, f"the operators', {operators.device}")
    return expect_one_batch({"measurements": batch, "target": tuple(target.shape[:-2])})


def expect_values(values: Any) -> None:
    """Raise ValueError unless these can be singular values: (..., k), none below 0."""
    expect_tensor("values", values, "a non-empty (..., k) of numbers >= 0", REAL, 1)
    if bool((values < 0).any()):
        raise ValueError(f"values hold {values.min().item():g}, expected numbers >= 0")


def expect_finite_matrix(name: str, matrix: Any) -> None:
    """Raise ValueError unless it is a matrix that has singular values."""
    expect_matrix(name, matrix)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{name} holds values that are not finite, expected finite ones")


def expect_pair(first: Any, second: Any) -> None:
    """Raise ValueError unless both are matrices of one type, on one device, that stack alike."""
    expect_matrix("first", first)
    expect_matrix("second", second)
    kinds = [(value.dtype, value.device) for value in (first, second)]
    expect("kind of second", kinds[1], kinds[0] == kinds[1], f"that of first, {kinds[0]}")
    expect_one_batch({"first": tuple(first.shape[:-2]), "second": tuple(second.shape[:-2])})


def expect_matching_columns(first: Any, second: Any) -> None:
    """Raise ValueError unless they are such a pair of equal sizes (..., d, k)."""
    expect_pair(first, second)
    told = f"those of first, {tuple(first.shape[-2:])}"
    expect("sizes of second", tuple(second.shape[-2:]), second.shape[-2:] == first.shape[-2:], told)
