"""Layers whose matrix is a product W_L ... W_1 of factors, with no activation between them.

A linear layer has the matrix (m, n) = (outputs, inputs). A convolution has the matrix (outputs, inputs * kh * kw), the
kernel with its last three axes flattened: W_1 is then a kh x kw convolution to w channels, all others are 1 x 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from compressible.recovery.checks import check_tensor, described, expect_factors
from compressible.recovery.factors import check_factors, multiply
from compressible.runtime.checks import expect, expect_integer, expect_sizes, is_integer


class FactoredLinear(nn.Module):
    """A linear layer W_L ... W_1 x + b whose factors are trained; they act in turn, so that narrow ones are cheap.

    Args:
        factors: [W_1 (w, n), W_2 (w, w), ..., W_L (m, w)], L >= 2, the factor that acts first coming first.
        bias: b (m,), or None for none.

    Raises:
        ValueError: for factors that do not chain, or a bias of another size or kind.

    Example:
        >>> import torch, compressible as cd
        >>> factors = cd.orthogonal_factors((8, 6), width=2, dtype=torch.float32)
        >>> layer = cd.FactoredLinear(factors)
        >>> layer(torch.ones(5, 6)).shape, layer.weight.shape
        (torch.Size([5, 8]), torch.Size([8, 6]))

    Reference:
        P2, the networks "+DLN" (full width) and "+C-DLN" (inner width k); the cost of an input is the sum of the
        factors' sizes, 2 w k + (L - 2) k^2 in place of w^2.
    """

    def __init__(self, factors: Sequence[Tensor], bias: Tensor | None = None) -> None:
        super().__init__()
        _check(factors, bias)
        self.factors = nn.ParameterList(nn.Parameter(factor) for factor in factors)
        self.bias = None if bias is None else nn.Parameter(bias)

    @property
    def weight(self) -> Tensor:
        """The end-to-end matrix W_L ... W_1 (m, n)."""
        return multiply(list(self.factors))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return W_L ... W_1 x + b (..., m) of inputs x (..., n)."""
        *inner, last = self.factors
        for factor in inner:
            inputs = functional.linear(inputs, factor)
        return functional.linear(inputs, last, self.bias)

    def extra_repr(self) -> str:
        """What printing the module shows."""
        return _describe(self.factors, self.bias)


class FactoredConv2d(nn.Module):
    """A convolution whose matrix (outputs, inputs * kh * kw) is W_L ... W_1: one kh x kw convolution, then 1 x 1 ones.

    Args:
        factors: [W_1 (w, inputs * kh * kw), W_2 (w, w), ..., W_L (outputs, w)], L >= 2.
        bias: (outputs,), or None for none.
        kernel_size: (kh, kw).
        stride, padding, dilation: of the kh x kw convolution, as nn.Conv2d has them.

    Raises:
        ValueError: for factors that do not chain, a bias of another size, a kernel that does not divide W_1, or
            strides and the like that nn.Conv2d would not take.

    Example:
        >>> import torch, compressible as cd
        >>> factors = cd.orthogonal_factors((8, 3 * 9), width=2, dtype=torch.float32)
        >>> cd.FactoredConv2d(factors, kernel_size=(3, 3), padding=(1, 1))(torch.ones(5, 3, 10, 10)).shape
        torch.Size([5, 8, 10, 10])

    Reference:
        P2 names convolutional networks as an open question; this is its layer for their matrices.
    """

    def __init__(
        self,
        factors: Sequence[Tensor],
        bias: Tensor | None = None,
        kernel_size: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        _check(factors, bias)
        kernel_size = _pair("kernel_size", kernel_size)
        stride, dilation = _window("stride", stride), _window("dilation", dilation)
        padding = _padding(padding, stride) if isinstance(padding, str) else _window("padding", padding, 0)
        taps, columns = kernel_size[0] * kernel_size[1], factors[0].shape[1]
        if columns % taps:
            told = f"a multiple of the kernel's {taps} taps, kernel_size {kernel_size}"
            raise ValueError(f"W_1 of factors has {columns} columns, expected {told}")
        self.factors = nn.ParameterList(nn.Parameter(factor) for factor in factors)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.kernel_size, self.in_channels = tuple(kernel_size), columns // taps
        self.stride, self.padding, self.dilation = stride, padding, dilation

    @property
    def weight(self) -> Tensor:
        """The end-to-end matrix W_L ... W_1 (outputs, inputs * kh * kw)."""
        return multiply(list(self.factors))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the convolved inputs (B, outputs, H', W') of (B, inputs, H, W)."""
        first, *inner, last = self.factors
        kernel = first.reshape(-1, self.in_channels, *self.kernel_size)
        inputs = functional.conv2d(inputs, kernel, None, self.stride, self.padding, self.dilation)
        for factor in inner:
            inputs = functional.conv2d(inputs, factor[:, :, None, None])
        return functional.conv2d(inputs, last[:, :, None, None], self.bias)

    def extra_repr(self) -> str:
        """What printing the module shows."""
        window = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return f"{_describe(self.factors, self.bias)}, {window}"


WIDEST = 2**31 - 1  # of a window's step
FACTORED = (FactoredLinear, FactoredConv2d)
MATRICES = (nn.Linear, nn.Conv2d, *FACTORED)


def weight_matrix(module: nn.Module) -> Tensor:
    """Return the end-to-end matrix (m, n) of a layer: linear, convolution or factored; TypeError for another module."""
    if not isinstance(module, MATRICES):
        raise TypeError(f"module is {type(module).__name__}, expected Linear, Conv2d, FactoredLinear or FactoredConv2d")
    return module.weight.flatten(1)


def outer_factors(model: nn.Module) -> set[str]:
    """Return the parameter names of the first and the last factor of every factored layer of a model."""
    return {
        f"{name}.factors.{index}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, FACTORED)
        for index in (0, len(module.factors) - 1)
    }


def _pair(name: str, value: Any, least: int = 1) -> tuple[int, int]:
    first, second = expect_sizes(name, value, f"a pair of integers >= {least}", 2, least)
    expect(name, value, max(first, second) <= WIDEST, f"integers up to {WIDEST}")
    return first, second


def _window(name: str, value: Any, least: int = 1) -> Any:
    """What nn.Conv2d takes: a pair of integers, or one; ValueError for anything else."""
    return expect_integer(name, value, least, WIDEST) if is_integer(value) else _pair(name, value, least)


def _padding(name: str, stride: Any) -> str:
    told = "'same' (with stride 1), 'valid', or integers"
    expect("padding", name, name == "valid" or (name == "same" and stride in (1, (1, 1))), told)
    return name


def _check(factors: Sequence[Tensor], bias: Tensor | None) -> None:
    expect_factors(factors)
    if any(factor.dim() != 2 for factor in factors):
        raise ValueError(f"factors have shapes {[tuple(factor.shape) for factor in factors]}, expected matrices")
    outputs = factors[-1].shape[0]
    check_factors(factors, (outputs, factors[0].shape[1]))
    if bias is None:
        return
    check_tensor("bias", bias)
    if bias.shape != (outputs,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {(outputs,)}")
    kind, wanted = ((each.dtype, each.device, each.layout) for each in (bias, factors[0]))
    if kind != wanted:
        raise ValueError(f"bias has {described(bias)} on {bias.device}, expected the factors' {wanted}")


def _describe(factors: Sequence[Tensor] | nn.ParameterList, bias: Tensor | None) -> str:
    shapes = " x ".join(str(tuple(factor.shape)) for factor in reversed(list(factors)))
    return f"{shapes}, bias={bias is not None}"
