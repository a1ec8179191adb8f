"""The kernel of attention with dropout against the form written out: on CUDA or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import few
from torch.nn.functional import scaled_dot_product_attention as attention

from compressible.finetuning.dropout.per_run import PerRunDropout
from compressible.runtime.devices import interpreted, matmul_precision

pytest.importorskip("triton", reason="triton is not installed: Linux only")
from compressible.finetuning.dropout.triton_attention import dropped_attention, dropped_attention_backward

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROOM = 227 * 1024  # an H200's
PART = round(0.3 * 2**31)
FLOAT32 = 1e-2 if CUDA else 1e-5  # TensorFloat-32 on CUDA
SHAPES = [(19, 37, 40), (32, 32, 64), (128, 128, 64), (128, 100, 32), (1, 70, 64)] if CUDA else [(19, 37, 40)]
MASKS = ["none", "line", "scattered", "float", "lowest"]
# Each shape once, with another mask: on a GPU most of the other pairs are left to the slow tests.
CASES = [(*shape, mask) for shape in SHAPES for mask in MASKS]
CASES.sort(key=lambda case: SHAPES.index(case[:3]) % len(MASKS) != MASKS.index(case[3]))
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not CUDA and not interpreted(), reason="needs a CUDA device or Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # words wrap around, in numpy where interpreted
]


@pytest.fixture(autouse=True)
def tf32():
    """Let float32 take the kernel, too."""
    with matmul_precision("tf32"):
        yield


def per_run(seeds=(3, 9), room=ROOM) -> PerRunDropout:
    found = PerRunDropout(seeds, torch.tensor(5, device=DEVICE))
    found.room = room
    return found


def heads(rows, count, length, size, kind=torch.float32):
    """(rows, count, length, size) as models make it: a transposed view."""
    return torch.randn(rows, length, count, size, device=DEVICE).to(kind).transpose(1, 2).requires_grad_()


def masks(rows, queries, keys):
    lengths = torch.randint(1, keys + 1, (rows, 1, 1, 1), device=DEVICE)
    seen = torch.arange(keys, device=DEVICE) < lengths
    scattered = torch.rand(rows, 1, queries, keys, device=DEVICE) > 0.4
    scattered[..., 0] = True
    return {
        "none": None, "line": seen, "expanded": seen.expand(-1, 1, queries, -1), "scattered": scattered,
        "float": torch.randn(2, queries, keys, device=DEVICE).transpose(1, 2).contiguous().transpose(1, 2),
        "lowest": torch.zeros(seen.shape, device=DEVICE).masked_fill(~seen, torch.finfo(torch.float32).min),
    }  # fmt: skip


def both(query, key, value, numbers=None, **options):
    """Output and gradients by the kernel, and written out in float64."""
    weight = torch.randn(*query.shape[:3], value.shape[3], device=DEVICE).to(query.dtype)
    results = []
    for kind in (query.dtype, torch.float64):
        own = [x.detach().to(kind).requires_grad_() for x in (query, key, value)]
        mask = options.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            mask = mask.to(kind)
        with per_run() as drawn:
            drawn.numbers = numbers
            out = attention(*own, **(options | {"attn_mask": mask}))
        assert drawn.place == 1
        results.append([out, *torch.autograd.grad((out * weight.to(kind)).sum(), own)])
    return results


def assert_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize("queries, keys, size, mask", few(CASES, len(SHAPES) + 3))
def test_the_kernel_and_its_gradients_equal_the_form_written_out(queries, keys, size, mask):
    torch.manual_seed(0)
    query, key, value = (heads(4, 2, n, size) for n in (queries, keys, keys))
    options = {"attn_mask": masks(4, queries, keys)[mask], "dropout_p": 0.3}
    assert_close(*both(query, key, value, **options), FLOAT32)


@pytest.mark.parametrize("length, size", [(96, 64), (5, 8)])
def test_so_they_do_under_a_causal_mask_and_another_scale(length, size):
    torch.manual_seed(1)
    query, key, value = (heads(2, 1, length, size) for _ in range(3))
    assert_close(*both(query, key, value, is_causal=True, scale=0.3, dropout_p=0.1), FLOAT32)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length, size", few([(20, 64), (128, 64), (128, 128)] if CUDA else [(20, 64)], 1))
def test_half_precision_stays_within_its_noise(length, size, kind):
    torch.manual_seed(2)
    query, key, value = (heads(4, 2, length, size, kind) for _ in range(3))
    mask = masks(4, length, length)["line"]
    found, expected = both(query, key, value, attn_mask=mask, dropout_p=0.3)
    assert {x.dtype for x in found} == {kind}
    assert_close(found, expected, 2e-2)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, of the NaN
def test_rows_that_see_nothing_get_equal_weights_under_the_lowest_mask_and_nan_under_a_bool_mask():
    query, key, value = (heads(2, 1, 6, 16) for _ in range(3))
    lowest = torch.full((2, 1, 1, 6), torch.finfo(torch.float32).min, device=DEVICE)
    with per_run(room=0):
        expected = attention(query, key, value, lowest, dropout_p=0.3)
    slopes = torch.autograd.grad(expected.sum(), (query, key, value))
    with per_run():
        out = attention(query, key, value, lowest, dropout_p=0.3)
    found = out, *torch.autograd.grad(out.sum(), (query, key, value))
    assert_close(found, [x.double() for x in (expected, *slopes)], FLOAT32)
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool, device=DEVICE)
    seen[0, :, 2] = False
    for room in (ROOM, 0):
        with per_run(room=room):
            out = attention(query, key, value, seen, dropout_p=0.3)
        assert out[0, :, 2].isnan().all() and out.isnan().sum() == 16


@pytest.mark.parametrize("place", [1, 31])
def test_masks_are_those_of_the_form_written_out(place):
    """Values are the identity, so that the output is the weights, all of them equal."""
    rows, count, length = 6, 3, 64
    zeros = torch.zeros(rows, count, length, length, device=DEVICE)
    value = torch.eye(length, device=DEVICE).expand(rows, count, -1, -1)
    drawn = per_run((1, -(2**31), 2**31 - 1))
    drawn.step.fill_(2**33 + 12345)
    drawn.place = place - 1
    out = drawn.attention(zeros, zeros, value, dropout_p=0.3)
    assert drawn.place == place
    expected = drawn.keep((rows, count, length, length), PART, torch.device(DEVICE))
    assert torch.equal(out != 0, expected)
    assert out[expected].unique().numel() == 1
    torch.testing.assert_close(out.max().item(), 2**31 / (2**31 - PART) / length, rtol=1e-3, atol=0)


def test_outputs_and_gradients_have_the_heads_side_by_side_in_memory():
    query, key, value = (heads(2, 3, n, 16) for n in (5, 7, 7))
    with per_run():
        out = attention(query, key, value, dropout_p=0.3)
    for x in (out, *torch.autograd.grad(out.sum(), (query, key, value))):
        assert x.transpose(1, 2).is_contiguous()


def test_rows_of_given_numbers_get_the_masks_of_these():
    torch.manual_seed(2)
    query, key, value = (heads(4, 2, 7, 8) for _ in "qkv")
    numbers = torch.tensor([1, 0, 0, 1], device=DEVICE).int()
    assert_close(*both(query, key, value, numbers, dropout_p=0.3), FLOAT32)
    turned = torch.tensor([1, 0, 2, 3], device=DEVICE)
    plain, other = (
        both(query, key, value, dropout_p=0.3),
        both(*(x[turned] for x in (query, key, value)), numbers, dropout_p=0.3),
    )
    torch.testing.assert_close(plain[1][0][turned], other[1][0])


def test_memory_may_lie_anyhow():
    torch.manual_seed(3)
    packed = torch.randn(4, 9, 3, 2, 16, device=DEVICE)
    query, key, value = packed.unbind(2)
    views = query.transpose(1, 2), key.transpose(1, 2), value.permute(0, 2, 3, 1).contiguous().transpose(2, 3)
    plain = [x.clone(memory_format=torch.contiguous_format) for x in views]
    outs = []
    for parts in (views, plain):
        with per_run():
            outs.append(attention(*parts, dropout_p=0.3))
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("case", ["long", "wide", "double", "float32", "grouped", "sought mask", "shared keys", "room"])
def test_what_the_kernel_does_not_do_is_written_out(case):
    kind = torch.float64 if case == "double" else torch.float32
    query, key, value = (heads(2, 2, 129 if case == "long" else 4, 129 if case == "wide" else 8, kind) for _ in "qkv")
    mask = torch.zeros(4, 4, device=DEVICE, requires_grad=True) if case == "sought mask" else None
    if case == "shared keys":
        key, value = key[:1], value[:1]
    elif case == "grouped":
        key, value = key[:, :1], value[:, :1]
    drawn = per_run(room=100_000 if case == "room" else ROOM)
    with matmul_precision("float32" if case == "float32" else "tf32"), drawn:
        assert case == "grouped" or drawn.attendable(query, key, value, mask) is False
        attention(query, key, value, mask, dropout_p=0.3, enable_gqa=case == "grouped")
    assert drawn.place == 1


def test_a_batch_that_is_not_the_runs_is_refused():
    query = heads(3, 2, 4, 8)
    with per_run(), pytest.raises(ValueError, match="expected a multiple of 2"):
        attention(query, query, query, dropout_p=0.3)


def test_the_operators_keep_torchs_rules():
    query, key, value = (heads(2, 2, n, 16) for n in (3, 5, 5))
    drawn = per_run()
    rest = masks(2, 3, 5)["line"], drawn.seeds, drawn.step, torch.tensor([7, 1]).int().to(DEVICE), 1, PART, 0.25, False
    torch.library.opcheck(dropped_attention, (query, key, value, *rest))
    inputs = [x.detach() for x in (query, key, value)]
    backward = torch.randn_like(inputs[0]), *inputs, *rest
    torch.library.opcheck(dropped_attention_backward, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_compiled_whole_it_stays_the_same():
    """On CUDA by inductor, which takes long for a CPU."""
    torch.manual_seed(4)
    weights = [torch.randn(32, 32, device=DEVICE, requires_grad=True) for _ in range(4)]
    x, mask, drawn = torch.randn(4, 10, 32, device=DEVICE), masks(4, 10, 10)["expanded"], per_run()

    def layer(x):
        with drawn:
            parts = ((x @ weight).view(4, 10, 2, 16).transpose(1, 2) for weight in weights[:3])
            out = attention(*parts, mask, dropout_p=0.3).transpose(1, 2).reshape(4, 10, 32)
            return out.relu() @ weights[3]

    torch._dynamo.reset()
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="inductor" if CUDA else "aot_eager")):
        drawn.begin()  # which entering does not do where it is compiled
        out = call(x)
        assert drawn.place == 1
        results.append([out, *torch.autograd.grad((out * out).sum(), weights)])
    assert_close(results[1], [x.double() for x in results[0]], FLOAT32)


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
def test_a_cuda_graph_draws_new_masks_as_its_step_goes_on():
    query, key, value = (heads(2, 2, 32, 64, torch.bfloat16) for _ in range(3))
    drawn = per_run()

    def work():
        with drawn:
            out = attention(query, key, value, dropout_p=0.3)
        return [out, *torch.autograd.grad(out.sum(), (query, key, value))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    for step in (5, 6):
        drawn.step.fill_(step)
        graph.replay()
        torch.testing.assert_close(found, work(), rtol=0, atol=0)
