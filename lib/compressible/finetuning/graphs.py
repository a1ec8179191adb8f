"""A pass's steps as CUDA graphs, one a padded length, and what keeps a step from being one.

A step is rehearsed before it is captured, as a capture would take it: models ask whether one is under way and then
leave out what a graph cannot hold. So most of what cannot be captured is found while nothing is being captured yet.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

from compressible.finetuning.constants import DeviceConstants

Step = Callable[[dict[str, Tensor], Tensor], object]  # takes tokens (S * B, T) by name and labels (S * B, ...)
WARM_UPS = 2  # for libraries, and for a compiler, which is through with a step after its second time
_BROKEN: list[torch.cuda.CUDAGraph] = []  # whose captures did not end: memory allocators go on asking them


class StepGraphs:
    """The graphs of the steps of one pass on `device`.

    gradients: a step without its update, which is what is rehearsed; update: the whole of it, which is captured.
    compiled: whether a compiler reads the step, which makes its constants on the device itself.
    """

    def __init__(self, gradients: Step, update: Step, device: torch.device, compiled: bool) -> None:
        self.gradients, self.update, self.device, self.compiled = gradients, update, device, compiled
        self.graphs: dict[tuple, _Graph] = {}
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def step(self, tokens: dict[str, Tensor], labels: Tensor) -> None:
        """Take one step with these rows; an exception where it cannot be captured, and nothing was done."""
        key = tuple(value.shape for value in (*tokens.values(), labels))
        with torch.cuda.device(self.device):
            if key not in self.graphs:
                self.graphs[key] = _Graph(self, tokens, labels)
            self.graphs[key].replay(tokens, labels)


class _Graph:
    """One step for one padded length as a CUDA graph over buffers of its own."""

    def __init__(self, graphs: StepGraphs, tokens: dict[str, Tensor], labels: Tensor) -> None:
        self.tokens = {name: value.clone() for name, value in tokens.items()}
        self.labels, self.graph = labels.clone(), torch.cuda.CUDAGraph()
        self.constants = None if graphs.compiled else DeviceConstants(graphs.device)
        with torch.random.fork_rng([graphs.device]), _aside(graphs.stream):
            rehearse(lambda: graphs.gradients(self.tokens, self.labels), graphs.device, self.constants)
        capture = torch.cuda.graph(self.graph, pool=graphs.pool, stream=graphs.stream)
        with _put_back(self.graph, graphs.pool, graphs.device), capture, self.constants or nullcontext():
            graphs.update(self.tokens, self.labels)

    def replay(self, tokens: dict[str, Tensor], labels: Tensor) -> None:
        """Take one step with these rows."""
        for name, value in tokens.items():
            self.tokens[name].copy_(value)
        self.labels.copy_(labels)
        self.graph.replay()


def rehearse(step: Callable[[], object], device: torch.device, constants: DeviceConstants | None) -> None:
    """Warm up what a step needs, its constants included, and take it once more as a capture will.

    Raises RuntimeError where the host waits for the device, or sends it something else than before.
    """
    for _ in range(WARM_UPS):
        with _as_captured(constants):
            step()
    with _without_waiting(device), _as_captured(constants):
        step()


@contextmanager
def _aside(stream: torch.cuda.Stream) -> Iterator[None]:
    """Work on another stream, whose work the current one waits for however it ends."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


@contextmanager
def _as_captured(constants: DeviceConstants | None) -> Iterator[None]:
    """Answer models that ask whether a graph is being captured with yes; a compiler's guards see it as it is."""
    if constants is None:
        yield
        return
    before = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        with constants:
            yield
    finally:
        torch.cuda.is_current_stream_capturing = before


@contextmanager
def _without_waiting(device: torch.device) -> Iterator[None]:
    """Let PyTorch raise RuntimeError where the host waits for a GPU; it does not know of all such places."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # it calls this feature a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _put_back(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: torch.device) -> Iterator[None]:
    """Leave stream, allocator and generator as they were where a capture breaks off; torch does not."""
    stream, generator = torch.cuda.current_stream(device), torch.cuda.default_generators[device.index]
    state = generator.get_state()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        fresh = torch.Generator(device)  # the one that was captured may still think that it is
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        if not _ended(graph):
            _BROKEN.append(graph)
            with suppress(RuntimeError, AttributeError):  # its name is PyTorch's own and may move
                torch.cuda.memory._cuda_endAllocateToPool(device.index, pool)
        raise


def _ended(graph: torch.cuda.CUDAGraph) -> bool:
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def cause(error: BaseException) -> str:
    """Return in one line what first went wrong and the line of the model's code in which it did."""
    while error.__context__ is not None:
        error = error.__context__
    ours = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
    lines = [at for at in traceback.extract_tb(error.__traceback__) if not at.filename.startswith(ours)]
    said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'without words'}"
    if not lines:
        return said
    at = lines[-1]
    return f"{said} (at {Path(at.filename).name}:{at.lineno}, `{at.line}`)"
