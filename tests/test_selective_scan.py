"""Test the selective scan against the plain loop, its memory and tracing."""

import functools
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

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


class Case(NamedTuple):
    """Where a scan runs. On a CPU, `plan` forces one of the ways that `_make_plan` divides the work."""

    device: str
    backend: str | None
    plan: str = "default"

    def scan(self, *inputs):
        return selective_scan(*inputs, backend=self.backend)


def gpu_case(backend, missing):
    return pytest.param(
        Case("cuda", backend),
        id=f"cuda-{backend}",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
            pytest.mark.skipif(missing, reason=f"{backend} cannot be imported"),
        ],
    )


CPU = pytest.param(Case("cpu", "torch"), id="cpu-torch")
TRACED = pytest.param(Case("cpu", "torch", "traced"), id="cpu-torch-traced")
PLANS = [pytest.param(Case("cpu", "torch", plan), id=plan) for plan in ("one_chunk", "many_chunks", "cuda")] + [TRACED]
INTERPRETED = pytest.param(
    Case("cpu", "triton"),
    id="cpu-triton",
    marks=[
        pytest.mark.skipif(module.selective_scan_triton is None, reason="triton cannot be imported"),
        pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    ],
)
# None: the backend that `_choose_backend` picks.
GPU_TORCH = [gpu_case("torch", False), gpu_case(None, False)]
GPU = [
    *GPU_TORCH,
    gpu_case("triton", module.selective_scan_triton is None),
    gpu_case("mamba_ssm", module.selective_scan_fn is None),
]


def on(*cases):
    return pytest.mark.parametrize("case", cases, indirect=True)


everywhere = on(CPU, INTERPRETED, *GPU)
everywhere_and_by_every_plan = on(CPU, *PLANS, INTERPRETED, *GPU)


@pytest.fixture
def case(request, monkeypatch):
    make_plan = module._make_plan
    if request.param.plan == "one_chunk":
        monkeypatch.setattr(module, "CPU_MIN_STEP", 1)
    elif request.param.plan == "many_chunks":
        monkeypatch.setattr(module, "CPU_MIN_STEP", 2**30)
        monkeypatch.setattr(module, "CPU_SEGMENT", 3)
    elif request.param.plan == "cuda":
        monkeypatch.setattr(module, "_make_plan", lambda b, s, n, _, t: make_plan(b, s, n, torch.device("cuda"), t))
    elif request.param.plan == "traced":
        monkeypatch.setattr(module, "_make_plan", lambda b, s, n, d, _: make_plan(b, s, n, d, True))
    return request.param


def make_inputs(batch=2, channels=8, length=37, groups=4, states=4, with_d=True, dtype=torch.float32, device="cpu"):
    def normal(*shape):
        return torch.randn(*shape, dtype=dtype)

    inputs = [
        normal(batch, channels, length),
        F.softplus(normal(batch, channels, length) - 2),
        -states * torch.rand(channels, states, dtype=dtype),
        normal(batch, groups, states, length),
        normal(batch, groups, states, length),
    ]
    inputs += [normal(channels)] if with_d else []
    return [z.to(device).requires_grad_() for z in inputs]


def run_with_grads(function, inputs, seed=0):
    y = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    grad_y = torch.randn(y.shape, generator=generator).to(y)
    return y.detach(), *torch.autograd.grad(y, inputs, grad_y)


def assert_same(case, inputs, tolerance=1e-4, smallest=1e-12, expected=None):
    """Compare y and all gradients with the plain loop, relative to the largest entry or to `smallest`."""
    expected = expected or run_with_grads(selective_scan_ref, inputs)
    for name, got, want in zip(NAMES, run_with_grads(case.scan, inputs), expected, strict=False):
        assert got.dtype == want.dtype and got.shape == want.shape, name
        want = want.to(got.device)
        error = (got - want).abs().max() / want.abs().max().clamp_min(smallest)
        assert error <= tolerance, f"{name}: {error:.1e}"


@everywhere_and_by_every_plan
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65])
def test_lengths(case, length):
    torch.manual_seed(length)
    assert_same(case, make_inputs(length=length, device=case.device))


@functools.cache
def long_inputs(length):
    """Return inputs and the results of the plain loop, which takes seconds."""
    torch.manual_seed(0)
    inputs = make_inputs(batch=1, channels=4, length=length, groups=2, states=2)
    # A slow decay, so that early steps still matter after many chunks.
    inputs[2] = (inputs[2].detach() * 1e-3).requires_grad_()
    return inputs, run_with_grads(selective_scan_ref, inputs)


@on(CPU, TRACED, *GPU)
@pytest.mark.parametrize("length", [576, 2304])
def test_long(case, length):
    inputs, expected = long_inputs(length)
    assert_same(case, [z.detach().to(case.device).requires_grad_() for z in inputs], expected=expected)


@everywhere
@pytest.mark.parametrize("with_d", [True, False])
@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize(("groups", "batch"), [(1, 3), (4, 1)])
def test_sizes(case, groups, batch, states, with_d):
    torch.manual_seed(0)
    assert_same(case, make_inputs(batch, 32, 20, groups, states, with_d, device=case.device))


@everywhere
@pytest.mark.parametrize("width", [1, 3, 24])
def test_widths(case, width):
    torch.manual_seed(0)
    assert_same(case, make_inputs(channels=3 * width, length=20, groups=3, states=5, device=case.device))


@on(CPU)
def test_batch_in_several_parts(case, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(module, "CPU_MAX_STEP", 2 * 8 * 4 * 3)  # 3 chunks
    assert_same(case, make_inputs(batch=5))


@everywhere_and_by_every_plan
@pytest.mark.parametrize("exponent", [-200.0, -30.0, -1e-7])
def test_any_decay(case, exponent):
    torch.manual_seed(0)
    inputs = make_inputs(length=70, device=case.device)
    inputs[1] = torch.ones_like(inputs[1]).requires_grad_()
    inputs[2] = torch.full_like(inputs[2], exponent).requires_grad_()
    # At -200 the gradient of A is below 1e-87: zero in float32. The kernel of mamba_ssm subtracts near equals there,
    # and rounding errors of the size of a state remain.
    is_exact = module.selective_scan_fn is None or case.backend not in ("mamba_ssm", None)
    assert_same(case, inputs, smallest=1e-12 if is_exact else 1)


@everywhere
def test_not_contiguous(case):
    torch.manual_seed(0)
    x, delta, A, B, C, D = (z.detach() for z in make_inputs(device=case.device))
    inputs = [
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        delta.repeat_interleave(2, dim=2)[..., ::2],
        A.T.contiguous().T,
        B.flip(3).contiguous().flip(3).mT.contiguous().mT,
        C[:, :, :1].expand_as(C),
        D.repeat_interleave(2)[::2],
    ]
    assert_same(case, [z.requires_grad_() for z in inputs])


@everywhere
def test_inputs_stay_as_they_are(case):
    inputs = make_inputs(batch=1, channels=1, length=1, groups=1, states=1, device=case.device)
    before = [z.detach().clone() for z in inputs]
    run_with_grads(case.scan, inputs)
    torch.testing.assert_close(inputs, before, atol=0, rtol=0)


# The kernels compute in float32.
@on(CPU, *PLANS, *GPU_TORCH)
def test_gradcheck(case):
    torch.manual_seed(0)
    inputs = make_inputs(1, channels=4, length=7, groups=2, states=2, dtype=torch.float64, device=case.device)
    assert torch.autograd.gradcheck(case.scan, inputs)


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(case, dtype):
    torch.manual_seed(0)
    inputs = [z.detach().to(dtype).requires_grad_() for z in make_inputs(length=65, device=case.device)]
    # Both compute in float32; only the last rounding may differ.
    assert_same(case, inputs, tolerance=2 * torch.finfo(dtype).eps)


@everywhere
def test_autocast_changes_nothing(case):
    torch.manual_seed(0)
    inputs = make_inputs(device=case.device)
    expected = run_with_grads(case.scan, inputs)
    with torch.autocast(case.device, dtype=torch.bfloat16):
        got = run_with_grads(case.scan, inputs)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


@everywhere
def test_same_alone_and_in_a_batch(case):
    torch.manual_seed(0)
    x, delta, A, B, C, D = (z.detach() for z in make_inputs(batch=3, length=100, device=case.device))
    together = case.scan(x, delta, A, B, C, D)
    for row in range(3):
        part = slice(row, row + 1)
        alone = case.scan(x[part], delta[part], A, B[part], C[part], D)
        # Not the same bits: a vectorized exp rounds the last elements of a block differently.
        torch.testing.assert_close(alone, together[part], rtol=1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Record the largest number of bytes returned by an operation."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # Views, such as an expanded tensor, take no memory.
        sizes = (z.untyped_storage().nbytes() for z in tree_leaves(result) if torch.is_tensor(z))
        self.nbytes = max(self.nbytes, *sizes, 0)
        return result


@on(CPU, TRACED, *GPU)
def test_states_of_all_steps_never_exist_at_once(case):
    # The width 17 is no multiple of the blocks of a kernel.
    states, channels, length = 16, 68, 2304
    inputs = make_inputs(1, channels, length, 4, states, device=case.device)
    with LargestTensor() as largest:
        run_with_grads(case.scan, inputs)
    # 1/16 is the size of y. On a GPU segments are longer, or two blocks hold gradients of B and C.
    bound = 0.26 if case.plan == "traced" else 1 / 16 if case == ("cpu", "torch", "default") else 1 / 8
    assert largest.nbytes <= bound * channels * states * length * inputs[0].element_size()


class Scan(nn.Module):
    def __init__(self, case):
        super().__init__()
        *_, A, _, _, D = make_inputs(device=case.device)
        self.A, self.D = nn.Parameter(A.detach()), nn.Parameter(D.detach())
        self.case = case

    def forward(self, x, delta, B, C):
        return selective_scan(x, delta, self.A, B, C, self.D, self.case.backend)


def scan_inputs(batch, length, device):
    x, delta, _, B, C, _ = (z.detach() for z in make_inputs(batch=batch, length=length, device=device))
    return x, delta, B, C


# The tracer cannot look into kernels.
@on(CPU, *GPU_TORCH)
def test_export_with_dynamic_length(case):
    torch.manual_seed(0)
    model = Scan(case)
    batch, length = Dim("batch"), Dim("length", max=module.MAX_TRACED_LENGTH)
    shapes = ({0: batch, 2: length}, {0: batch, 2: length}, {0: batch, 3: length}, {0: batch, 3: length})
    # The example is shorter than a chunk: a count of 1 could be taken for a constant.
    exported = torch.export.export(model, scan_inputs(2, 4, case.device), dynamic_shapes=shapes).module()
    for rows, steps in ((1, 1), (3, 16), (2, 17), (1, 1000)):
        inputs = scan_inputs(rows, steps, case.device)
        torch.testing.assert_close(exported(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.thorough  # test_export.py compiles RUN
@on(CPU, *GPU_TORCH)
def test_compile_with_gradients(case):
    torch.manual_seed(0)
    model = Scan(case)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for rows, steps in ((2, 20), (3, 40)):
        inputs = [z.requires_grad_() for z in scan_inputs(rows, steps, case.device)]
        wanted = [*inputs, model.A, model.D]
        y, expected_y = compiled(*inputs), model(*inputs)
        torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-5)
        grad_y = torch.randn_like(y)
        got, expected = (torch.autograd.grad(z, wanted, grad_y) for z in (y, expected_y))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


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


def test_unknown_and_missing_backends_are_rejected(monkeypatch):
    with pytest.raises(ValueError, match='backend: got "fast"'):
        selective_scan(*make_inputs(), backend="fast")
    monkeypatch.setattr(module, "selective_scan_triton", None)
    with pytest.raises(ValueError, match='got "triton", which cannot be imported'):
        selective_scan(*make_inputs(), backend="triton")


def test_triton_runs_only_on_request(monkeypatch):
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setattr(module, "selective_scan_triton", print)
    for installed, expected in ((None, "torch"), (print, "mamba_ssm")):
        monkeypatch.setattr(module, "selective_scan_fn", installed)
        assert module._choose_backend(on_gpu) == expected
    monkeypatch.setattr(module, "BACKEND", "triton")
    assert module._choose_backend(on_gpu) == "triton"
    assert module._choose_backend(torch.zeros(1)) == "torch"


@pytest.mark.skipif(module.selective_scan_triton is None, reason="triton cannot be imported")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process runs the cases")
def test_triton_kernels_in_the_interpreter():
    # In a separate process, because triton reads the variable on import. All cases would take minutes.
    chosen = "cpu-triton and (test_widths or test_not_contiguous)"
    command = [sys.executable, "-m", "pytest", "-n", "0", __file__, "-k", chosen, "-p", "no:cacheprovider"]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout
