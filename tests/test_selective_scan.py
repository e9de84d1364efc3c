"""The selective scan against the plain loop, in values and gradients, and what it promises on memory and tracing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unconceal.models import selective_scan as module
from unconceal.models.selective_scan import selective_scan, selective_scan_ref


NAMES = ("y", "x", "delta", "A", "B", "C", "D")
# Every way to divide the work that `_make_plan` knows, forced on a small scan on the CPU.
PLANS = ("default", "one_chunk", "many_chunks", "cuda", "traced")


def make_inputs(batch=2, channels=8, length=37, groups=4, states=4, with_d=True, dtype=torch.float32, device="cpu"):
    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)

    inputs = [
        normal(batch, channels, length),
        F.softplus(normal(batch, channels, length) - 2),
        -states * torch.rand(channels, states, dtype=dtype, device=device),
        normal(batch, groups, states, length),
        normal(batch, groups, states, length),
    ]
    if with_d:
        inputs.append(normal(channels))
    return [z.requires_grad_() for z in inputs]


def run_with_grads(function, inputs, seed=0, **options):
    y = function(*inputs, **options)
    generator = torch.Generator().manual_seed(seed)
    grad_y = torch.randn(y.shape, generator=generator).to(y)
    return y.detach(), *torch.autograd.grad(y, inputs, grad_y)


def assert_same(inputs, tolerance=1e-4, **options):
    """Compare y and all gradients with the plain loop, relative to the largest entry of each."""
    expected = run_with_grads(selective_scan_ref, inputs)
    for name, got, want in zip(NAMES, run_with_grads(selective_scan, inputs, **options), expected, strict=False):
        assert got.dtype == want.dtype and got.shape == want.shape, name
        error = (got - want).abs().max() / want.abs().max().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.fixture(params=PLANS)
def plan(request, monkeypatch):
    make_plan = module._make_plan
    if request.param == "one_chunk":
        monkeypatch.setattr(module, "CPU_MIN_STEP", 1)
    elif request.param == "many_chunks":
        monkeypatch.setattr(module, "CPU_MIN_STEP", 2**30)
        monkeypatch.setattr(module, "CPU_SEGMENT", 3)
    elif request.param == "cuda":
        monkeypatch.setattr(module, "_make_plan", lambda b, s, n, _, t: make_plan(b, s, n, torch.device("cuda"), t))
    elif request.param == "traced":
        monkeypatch.setattr(module, "_make_plan", lambda b, s, n, d, _: make_plan(b, s, n, d, True))
    return request.param


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65])
def test_lengths(plan, length):
    torch.manual_seed(length)
    assert_same(make_inputs(length=length))


@pytest.mark.parametrize("length", [576, 2304, 9216])
def test_long(length):
    torch.manual_seed(0)
    # A slow decay, so that early steps still matter after many chunks.
    inputs = make_inputs(batch=1, channels=4, length=length, groups=2, states=2)
    inputs[2] = (inputs[2].detach() * 1e-3).requires_grad_()
    assert_same(inputs)


def test_long_in_a_compiled_plan(monkeypatch):
    torch.manual_seed(0)
    make_plan = module._make_plan
    monkeypatch.setattr(module, "_make_plan", lambda b, s, n, d, _: make_plan(b, s, n, d, True))
    inputs = make_inputs(batch=1, channels=2, length=2304, groups=1, states=1)
    inputs[2] = (inputs[2].detach() * 1e-3).requires_grad_()
    assert_same(inputs)


@pytest.mark.parametrize("with_d", [True, False])
@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_sizes(groups, batch, states, with_d):
    torch.manual_seed(0)
    assert_same(make_inputs(batch, 32, 40, groups, states, with_d))


def test_batch_in_several_parts(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(module, "CPU_CACHE", 2 * module.CPU_SEGMENT * 8 * 4)
    assert_same(make_inputs(batch=5))


@pytest.mark.parametrize("exponent", [-200.0, -30.0, -1e-7])
def test_any_decay(plan, exponent):
    torch.manual_seed(0)
    inputs = make_inputs(length=70)
    inputs[1] = torch.ones_like(inputs[1]).requires_grad_()
    inputs[2] = torch.full_like(inputs[2], exponent).requires_grad_()
    # At -200 the gradient of A is 1e-87 and less: nothing but zero in float32.
    assert_same(inputs)


def test_not_contiguous():
    torch.manual_seed(0)
    x, delta, A, B, C, D = (z.detach() for z in make_inputs())
    inputs = [
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        delta.repeat_interleave(2, dim=2)[..., ::2],
        A.T.contiguous().T,
        B.flip(3).contiguous().flip(3).mT.contiguous().mT,
        C[:, :, :1].expand_as(C),
        D.repeat_interleave(2)[::2],
    ]
    assert_same([z.requires_grad_() for z in inputs])


def test_inputs_stay_as_they_are():
    inputs = [z.detach() for z in make_inputs(batch=1, channels=1, length=1, groups=1, states=1)]
    before = [z.clone() for z in inputs]
    selective_scan(*inputs)
    for name, got, want in zip(NAMES[1:], inputs, before, strict=True):
        assert torch.equal(got, want), name


def test_gradcheck(plan):
    torch.manual_seed(0)
    inputs = make_inputs(batch=2, channels=4, length=7, groups=2, states=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(selective_scan, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype):
    torch.manual_seed(0)
    inputs = [z.detach().to(dtype).requires_grad_() for z in make_inputs(length=65)]
    # Both compute in float32; only the last rounding may differ.
    assert_same(inputs, tolerance=2 * torch.finfo(dtype).eps)


def test_autocast_changes_nothing():
    torch.manual_seed(0)
    inputs = make_inputs()
    expected = run_with_grads(selective_scan, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_with_grads(selective_scan, inputs)
    for name, g, e in zip(NAMES, got, expected, strict=True):
        assert torch.equal(g, e), name


def test_frozen_inputs():
    torch.manual_seed(0)
    inputs = make_inputs()
    expected = run_with_grads(selective_scan, inputs)
    for z in inputs[1:]:
        z.requires_grad_(False)
    y, grad_x = run_with_grads(lambda x: selective_scan(x, *inputs[1:]), inputs[:1])
    assert torch.equal(y, expected[0]) and torch.equal(grad_x, expected[1])


def test_rows_are_independent():
    torch.manual_seed(0)
    inputs = make_inputs(batch=3)
    expected = run_with_grads(selective_scan, inputs)
    poisoned = [z.detach().clone() for z in inputs]
    for z in (poisoned[0], poisoned[1], poisoned[3], poisoned[4]):
        z[1] = torch.nan
    got = run_with_grads(selective_scan, [z.requires_grad_() for z in poisoned])
    for index in (0, 1, 2, 4, 5):
        assert torch.equal(got[index][[0, 2]], expected[index][[0, 2]]), NAMES[index]
        assert got[index][1].isnan().all(), NAMES[index]


def test_same_alone_and_in_a_batch():
    torch.manual_seed(0)
    x, delta, A, B, C, D = (z.detach() for z in make_inputs(batch=3, length=100))
    together = selective_scan(x, delta, A, B, C, D)
    for row in range(3):
        part = slice(row, row + 1)
        alone = selective_scan(x[part], delta[part], A, B[part], C[part], D)
        # Not the same bits: a vectorised exp rounds the odd elements at the end of a block otherwise.
        torch.testing.assert_close(alone, together[part], rtol=1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Record the most elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # Views of a larger tensor, such as an expanded one, take no memory.
        sizes = (z.untyped_storage().nbytes() // z.element_size() for z in tree_leaves(result) if torch.is_tensor(z))
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize(("traced", "bound"), [(False, 1 / 16), (True, 0.26)])
def test_states_are_never_kept(monkeypatch, traced, bound):
    make_plan = module._make_plan
    monkeypatch.setattr(module, "_make_plan", lambda b, s, n, d, _: make_plan(b, s, n, d, traced))
    inputs = make_inputs(batch=1, channels=64, length=9216, groups=4, states=16)
    with LargestTensor() as largest:
        run_with_grads(selective_scan, inputs)
    # With 16 states, 1/16 is the size of y.
    assert largest.numel <= bound * 64 * 16 * 9216


class Scan(nn.Module):
    def __init__(self):
        super().__init__()
        *_, A, _, _, D = make_inputs()
        self.A, self.D = nn.Parameter(A.detach()), nn.Parameter(D.detach())

    def forward(self, x, delta, B, C):
        return selective_scan(x, delta, self.A, B, C, self.D)


def scan_inputs(batch, length):
    x, delta, _, B, C, _ = (z.detach() for z in make_inputs(batch=batch, length=length))
    return x, delta, B, C


def test_export_with_dynamic_length():
    torch.manual_seed(0)
    model = Scan()
    batch, length = Dim("batch"), Dim("length", max=module.MAX_TRACED_LENGTH)
    shapes = ({0: batch, 2: length}, {0: batch, 2: length}, {0: batch, 3: length}, {0: batch, 3: length})
    # An example of less than a chunk, where a count of 1 might be taken for a constant.
    exported = torch.export.export(model, scan_inputs(2, 4), dynamic_shapes=shapes).module()
    for rows, steps in ((1, 1), (3, 15), (2, 16), (1, 17), (2, 300), (1, 3000)):
        inputs = scan_inputs(rows, steps)
        torch.testing.assert_close(exported(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_compile_with_gradients():
    torch.manual_seed(0)
    model = Scan()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for rows, steps in ((2, 20), (3, 40)):
        inputs = [z.requires_grad_() for z in scan_inputs(rows, steps)]
        wanted = [*inputs, model.A, model.D]
        y, expected_y = compiled(*inputs), model(*inputs)
        torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-5)
        grad_y = torch.randn_like(y)
        got, expected = (torch.autograd.grad(z, wanted, grad_y) for z in (y, expected_y))
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


def test_too_long_for_a_compiled_program():
    with pytest.raises(ValueError, match=f"length: got .*, expected at most {module.MAX_TRACED_LENGTH}"):
        module._make_plan(1, 1, module.MAX_TRACED_LENGTH + 1, torch.device("cpu"), True)
    plan = module._make_plan(1, 1, module.MAX_TRACED_LENGTH, torch.device("cpu"), True)
    assert plan.num_chunks <= 2**plan.doublings
    assert module.MAX_TRACED_LENGTH >= 65_536


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("x", (2, 8), "(batch, channels, length)"),
        ("delta", (2, 8, 5), "(2, 8, 37)"),
        ("A", (6, 4), "(8, states)"),
        ("B", (2, 3, 4, 37), "groups a divisor of 8"),
        ("B", (2, 4, 5, 37), "(2, 4, 4, 37)"),
        ("C", (2, 1, 4, 37), "(2, 4, 4, 37)"),
        ("D", (1,), "(8,)"),
    ],
)
def test_wrong_shapes(name, shape, expected):
    inputs = dict(zip(NAMES[1:], make_inputs(), strict=True))
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError) as error:
        selective_scan(**inputs)
    message = str(error.value)
    assert message.startswith(f"{name}: got shape {shape}, expected") and expected in message and "\n" not in message


def test_unknown_backend():
    with pytest.raises(ValueError, match='backend: got "fast"'):
        selective_scan(*make_inputs(), backend="fast")


INTERPRETED = """
import sys

sys.path.insert(0, sys.argv[1])
import torch
from selective_scan import selective_scan, selective_scan_ref

torch.manual_seed(0)
# (batch, channels, length, groups, states): below, at and beyond a segment; widths 24, 16, 2 and 3, 5 states.
for b, d, n, g, s in ((2, 24, 17, 1, 5), (1, 32, 33, 2, 16), (1, 8, 1, 4, 1), (2, 3, 16, 1, 4)):
    x, B, C, D = (torch.randn(*shape) for shape in ((b, d, n), (b, g, s, n), (b, g, s, n), (d,)))
    inputs = [z.requires_grad_() for z in (x, torch.rand(b, d, n), -s * torch.rand(d, s), B, C, D)]
    got, want = selective_scan(*inputs, backend="triton"), selective_scan_ref(*inputs)
    grad = torch.randn_like(got)
    got, want = ((y, *torch.autograd.grad(y, inputs, grad)) for y in (got, want))
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton cannot be imported")
def test_triton_kernels_in_the_interpreter():
    # In a process of its own: triton reads the variable when it is imported.
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(Path(module.__file__).parent)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stdout.strip() == "equal", result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("length", [1, 16, 17, 65, 576])
@pytest.mark.parametrize("backend", ["torch", "triton", "mamba_ssm", None])
def test_on_cuda(backend, length):
    if backend == "triton" and module.triton is None:
        pytest.skip("triton cannot be imported")
    if backend == "mamba_ssm" and module.selective_scan_fn is None:
        pytest.skip("mamba_ssm cannot be imported")
    torch.manual_seed(0)
    for groups, states in ((1, 1), (4, 16)):
        assert_same(make_inputs(3, 64, length, groups, states, device="cuda"), backend=backend)
