"""Selective scan: a state-space recurrence with input-dependent parameters.

Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", Gu and Dao 2023,
https://arxiv.org/abs/2312.00752: equation 2 (the recurrence), equation 4 (zero-order hold, exp(delta A)) and
algorithm 2 (what varies along the sequence).

| symbol | here | shape |
|---|---|---|
| x, y | `x`, result | (batch, channels, length) |
| Delta | `delta`, positive | (batch, channels, length) |
| A | `A`, negative | (channels, states) |
| B, C | `B`, `C` | (batch, groups, states, length) |
| D | `D` | (channels,) |
"""

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .modeling_unconceal import without_autocast


try:
    from torch._higher_order_ops.scan import scan as loop
    from torch.compiler import is_exporting
except ImportError:  # before torch 2.7
    loop, is_exporting = None, torch.compiler.is_compiling

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None

try:
    from .selective_scan_triton import selective_scan_triton
except ImportError:
    selective_scan_triton = None


# What CUDA tensors use by default, by the environment: "triton", "mamba_ssm" or "torch". Triton is never the default.
BACKEND = os.environ.get("UNCONCEAL_SCAN_BACKEND")

# A "time-major" tensor is (time, rows, groups, ...): one step is then one contiguous block. A row is one sequence, or
# one chunk of a sequence if sequences are cut. A state is (rows, groups, states, width), width = channels / groups.
# The width is innermost, so every operation of a step runs along contiguous memory.


class _Plan(NamedTuple):
    """How the work of a scan is divided."""

    rows: int | None  # sequences of the batch that run together, or None for all
    num_chunks: int  # of a sequence; all chunks step at the same time, in two passes if there are several
    chunk: int  # steps of a chunk
    segment: int  # steps whose states exist at the same time, at most
    doublings: int  # passes that carry states over chunks, enough for 2^doublings chunks; 0 for a single chunk
    traced: bool  # whether the program is compiled, or exported by a torch version without loops


# Loop counts of a traced program are fixed, because they must not depend on the length.
TRACED_SEGMENT = 4
TRACED_NUM_SEGMENTS = 4
TRACED_DOUBLINGS = 14
MAX_TRACED_LENGTH = TRACED_SEGMENT * TRACED_NUM_SEGMENTS * (2**TRACED_DOUBLINGS - 1)
# On a GPU a launch costs more than the work of a step.
CUDA_SEGMENT = 8
CUDA_NUM_SEGMENTS = 8
# Steps of the longest segment on a CPU.
CPU_SEGMENT = 32
# Smaller steps, in elements, would be mostly call overhead. Sequences are cut into chunks to reach it.
CPU_MIN_STEP = 2**12
# Larger steps, in elements, would drive a segment out of the cache. Rows step together to come near it.
CPU_MAX_STEP = 2**16


def _check_shapes(x, delta, A, B, C, D):
    def check(name, tensor, fits, expected):
        if not fits:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")

    check("x", x, x.ndim == 3, "(batch, channels, length)")
    batch, channels, length = x.shape
    check("delta", delta, delta.shape == x.shape, tuple(x.shape))
    check("A", A, A.ndim == 2 and A.shape[0] == channels, f"({channels}, states)")
    is_grouped = B.ndim == 4 and channels % B.shape[1] == 0
    check("B", B, is_grouped, f"(batch, groups, states, length), groups a divisor of {channels}")
    projection = (batch, B.shape[1], A.shape[1], length)
    check("B", B, B.shape == projection, projection)
    check("C", C, C.shape == projection, projection)
    check("D", D, D is None or D.shape == (channels,), (channels,))


def _make_plan(batch, step, length, device, traced):
    # A step has `step` elements.
    if traced:
        if length > MAX_TRACED_LENGTH:
            raise ValueError(
                f"length: got {length}, expected at most {MAX_TRACED_LENGTH} when compiled; use smaller images."
            )
        chunk = TRACED_SEGMENT * TRACED_NUM_SEGMENTS
        # One chunk more than needed: tracing takes a count that can be 1 for the constant 1.
        num_chunks = (length + 2 * chunk - 1) // chunk
        return _Plan(None, num_chunks, chunk, TRACED_SEGMENT, TRACED_DOUBLINGS, True)
    if device.type == "cpu":
        # Independent of the batch, so that a sequence gives the same result alone and in a batch.
        segment, max_segments = CPU_SEGMENT, -(-length * step // (CPU_MIN_STEP * CPU_SEGMENT))
    else:
        segment, max_segments = CUDA_SEGMENT, CUDA_NUM_SEGMENTS
    num_chunks = -(-length // (segment * max_segments))
    rows = min(batch, max(1, CPU_MAX_STEP // (step * num_chunks))) if device.type == "cpu" else None
    # Equal parts need little padding.
    chunk = -(-length // num_chunks)
    segment = -(-chunk // -(-chunk // segment))
    return _Plan(rows, num_chunks, chunk, segment, (num_chunks - 1).bit_length(), False)


def _time_major(z, plan):
    # From (batch, groups, width, length) to (chunk length, batch * chunks, groups, width).
    batch, groups, width, length = z.shape
    if plan.traced or z.stride(2) != 1:
        # Copying a transposed matrix is fast; copying a permuted tensor of more dimensions is slow.
        z = z.reshape(-1, length).t().contiguous().view(length, batch, groups, width)
    else:
        z = z.permute(3, 0, 1, 2)
    if plan.traced or plan.num_chunks > 1:
        z = F.pad(z, (0, 0, 0, 0, 0, 0, 0, plan.num_chunks * plan.chunk - length))
        z = z.unflatten(0, (-1, plan.chunk)).permute(1, 2, 0, 3, 4).flatten(1, 2)
    return z


def _batch_major(z, plan, batch, length):
    """Undo `_time_major`. In memory, time stays outermost."""
    if plan.traced or plan.num_chunks > 1:
        z = z.unflatten(1, (batch, -1)).permute(2, 0, 1, 3, 4).flatten(0, 1)
        # A slice would make torch.export ask for a proof that the padded length is not the shorter one.
        z = z.index_select(0, torch.arange(length, device=z.device)) if plan.traced else z[:length]
    return z.permute(1, 2, 3, 0)


def _carry(decay, end, plan, reverse=False):
    """Return the state before each chunk, or after it in reverse.

    All are (rows, groups, states, width). `decay` is the factor of a chunk on the state before it, exp(A sum delta).
    `end` is the state after a chunk that starts at zero.
    """
    decay, end = (z.unflatten(0, (z.shape[0] // plan.num_chunks, plan.num_chunks)) for z in (decay, end))
    if reverse:
        decay, end = decay.flip(1), end.flip(1)
    index = torch.arange(plan.num_chunks, device=end.device)
    is_first = (index == 0).view(-1, 1, 1, 1)
    # Nothing comes before the first chunk. Every product that reaches beyond it has this zero factor, so the clamped
    # index below needs no mask.
    decay = decay.masked_fill(is_first, 0)
    for doubling in range(plan.doublings):
        source = (index - 2**doubling).clamp(min=0)
        end = torch.addcmul(end, decay, end.index_select(1, source))
        decay = decay * decay.index_select(1, source)
    start = end.index_select(1, (index - 1).clamp(min=0)).masked_fill(is_first, 0)
    return (start.flip(1) if reverse else start).flatten(0, 1)


class _Steps(NamedTuple):
    """Hold a (time, rows, groups, states, width) tensor and its steps."""

    whole: Tensor
    each: tuple[Tensor, ...]

    def first(self, count):
        """Return the first `count` steps."""
        return self if count == len(self.each) else _Steps(self.whole[:count], self.each[:count])


def _workspace(count, state, plan):
    # Reusable memory for segments: allocating costs more than the arithmetic.
    if plan.traced:
        return [None] * count
    buffers = (state.new_empty(plan.segment, *state.shape) for _ in range(count))
    return [_Steps(buffer, buffer.unbind()) for buffer in buffers]


def _outer(per_width, other, out):
    """Multiply (time, rows, groups, width) by states, into `out` if given."""
    if out is None:
        product = per_width.unsqueeze(-2) * other
        return _Steps(product, product.unbind())
    out = out.first(len(per_width))
    torch.mul(per_width.unsqueeze(-2), other, out=out.whole)
    return out


def _exponent(A):
    """Return log2(e) A, because exp2 is faster than exp."""
    return A * 1.4426950408889634  # a global constant would be an input of a compiled program


def _decays(delta, exponent, out):
    decays = _outer(delta, exponent, out)
    decays.whole.exp2_()
    return decays


def _total_decay(delta, exponent):
    return (delta.sum(0).unsqueeze(-2) * exponent).exp2_()


def _recur(summands, factors, first, in_place):
    """Return all r_t = summand_t + factor_t r_{t-1}, from r_{-1} = `first`."""
    results = []
    for summand, factor in zip(summands, factors, strict=True):
        first = torch.addcmul(summand, factor, first, out=summand if in_place else None)
        results.append(first)
    return results


def _states(decays, delta_x, B, state, out):
    """Return the states of a segment, starting from `state`."""
    summands = _outer(delta_x, B.unsqueeze(-1), out)
    each = _recur(summands.each, decays.each, state, out is not None)
    return _Steps(torch.stack(each), each) if out is None else summands


def _grad_states(decays, grad_y, C, carry, out):
    """Return the gradients of a segment's states and of the state before.

    `carry` is the gradient of the last state that comes from the next segment.
    """
    whole, summands = _outer(grad_y, C.unsqueeze(-1), out)
    last = torch.add(summands[-1], carry, out=None if out is None else summands[-1])
    each = [last, *_recur(summands[-2::-1], decays.each[:0:-1], last, out is not None)]
    return torch.stack(each[::-1]) if out is None else whole, decays.each[0] * each[-1]


def _segments(plan, *tensors):
    return list(zip(*(z.split(plan.segment) for z in tensors), strict=True))


def _scan_rows(x, delta, A, B, C, plan, keeps_starts):
    """Return y, time-major, and the state before each segment if wanted."""
    x, delta, B, C = (_time_major(z, plan) for z in (x, delta, B, C))
    exponent = _exponent(A)
    state = A.new_zeros(x.shape[1], *A.shape)
    decays_out, states_out = _workspace(2, state, plan)
    if plan.doublings:
        for x_s, delta_s, B_s in _segments(plan, x, delta, B):
            decays = _decays(delta_s, exponent, decays_out)
            state = _states(decays, delta_s * x_s.to(A.dtype), B_s, state, states_out).each[-1].clone()
        state = _carry(_total_decay(delta, exponent), state, plan)
    y, starts = [], []
    for x_s, delta_s, B_s, C_s in _segments(plan, x, delta, B, C):
        if keeps_starts:
            starts.append(state)
        decays = _decays(delta_s, exponent, decays_out)
        states = _states(decays, delta_s * x_s.to(A.dtype), B_s, state, states_out)
        y.append((C_s.unsqueeze(-2) @ states.whole).squeeze(-2))
        state = states.each[-1].clone()
    return torch.cat(y), starts


def _scan_rows_backward(grad_y, x, delta, A, B, C, starts, plan):
    """Return gradients of A, x, delta, B and C, time-major."""
    grad_y, x, delta, B, C = (_time_major(z, plan) for z in (grad_y, x, delta, B, C))
    exponent = _exponent(A)
    carry = A.new_zeros(x.shape[1], *A.shape)
    decays_out, states_out, grads_out = _workspace(3, carry, plan)
    if plan.doublings:
        for delta_s, grad_y_s, C_s in _segments(plan, delta, grad_y, C)[::-1]:
            _, carry = _grad_states(_decays(delta_s, exponent, decays_out), grad_y_s, C_s, carry, grads_out)
        carry = _carry(_total_decay(delta, exponent), carry, plan, reverse=True)
    grad_A = torch.zeros_like(A)
    parts = []
    for (x_s, delta_s, B_s, C_s, grad_y_s), start in zip(
        _segments(plan, x, delta, B, C, grad_y)[::-1], starts[::-1], strict=True
    ):
        decays = _decays(delta_s, exponent, decays_out)
        x_s = x_s.to(A.dtype)
        delta_x_s = delta_s * x_s
        states = _states(decays, delta_x_s, B_s, start, states_out).whole
        grads, carry = _grad_states(decays, grad_y_s, C_s, carry, grads_out)
        # A row times a transposed matrix is several times faster than the matrix times a column.
        grad_C = (grad_y_s.unsqueeze(-2) @ states.mT).squeeze(-2)
        grad_B = (delta_x_s.unsqueeze(-2) @ grads.mT).squeeze(-2)
        grad_delta_x = (B_s.unsqueeze(-2) @ grads).squeeze(-2)
        # Gradient of the exponent delta A: grad * previous state * decay.
        grads.mul_(decays.whole)
        grads[1:].mul_(states[:-1])
        grads[0].mul_(start)
        grad_A += _outer(delta_s, grads, decays_out).whole.sum((0, 1))
        grad_delta = grads.mul_(A).sum(-2).addcmul_(grad_delta_x, x_s)
        parts.append((grad_delta_x.mul_(delta_s), grad_delta, grad_B, grad_C))
    return grad_A, *(torch.cat(part[::-1]) for part in zip(*parts, strict=True))


def _split_rows(plan, *tensors):
    return list(zip(*([z] if plan.rows is None else z.split(plan.rows) for z in tensors), strict=True))


def _join_rows(parts, plan, batch, length):
    return _batch_major(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], plan, batch, length)


def _scan(x, delta, A, B, C, plan, keeps_starts=False):
    """Return y and, for each split of the batch, states before segments."""
    parts = [_scan_rows(x, delta, A, B, C, plan, keeps_starts) for x, delta, B, C in _split_rows(plan, x, delta, B, C)]
    y, starts = zip(*parts, strict=True)
    return _join_rows(y, plan, x.shape[0], x.shape[-1]), starts


class _SelectiveScan(torch.autograd.Function):
    """Scan (batch, groups, width, length); the backward pass recomputes the states."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, plan):
        y, starts = _scan(x, delta, A, B, C, plan, keeps_starts=True)
        ctx.plan = plan
        ctx.save_for_backward(x, delta, A, B, C, *(torch.stack(part) for part in starts))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, delta, A, B, C, *starts = ctx.saved_tensors
        with without_autocast(x.device.type):
            parts = [
                _scan_rows_backward(*part[:3], A, *part[3:], start.unbind(), ctx.plan)
                for part, start in zip(_split_rows(ctx.plan, grad_y, x, delta, B, C), starts, strict=True)
            ]
        grad_A, *grads = zip(*parts, strict=True)
        grads = (_join_rows(grad, ctx.plan, x.shape[0], x.shape[-1]) for grad in grads)
        grad_x, grad_delta, grad_B, grad_C = grads
        return grad_x.to(x.dtype), grad_delta, sum(grad_A), grad_B, grad_C, None


def _exported_scan(x, delta, A, B, C):
    """Scan by a loop operator, which ONNX calls Scan.

    The steps of a plan would be thousands of nodes, which take minutes to export and run slowly.
    """

    def step(state, now):
        delta, delta_x, B, C = now
        decay = torch.exp(delta.unsqueeze(-2) * A)
        state = torch.addcmul(delta_x.unsqueeze(-2) * B.unsqueeze(-1), decay, state)
        return state, (C.unsqueeze(-2) @ state).squeeze(-2)

    inputs = tuple(z.permute(3, 0, 1, 2).contiguous() for z in (delta, delta * x, B, C))
    _, y = loop(step, A.new_zeros(x.shape[0], *A.shape), inputs)
    # Contiguous: other strides would tie the program to a batch size.
    return y.permute(1, 2, 3, 0).contiguous()


def _portable_scan(x, delta, A, B, C):
    """Scan by operations of PyTorch alone; shapes as in `selective_scan`."""
    groups, batch = B.shape[1], x.shape[0]
    x, delta = (z.unflatten(1, (groups, -1)) for z in (x, delta))
    A = A.unflatten(0, (groups, -1)).mT.contiguous()
    if loop is not None and is_exporting():
        return _exported_scan(x, delta, A, B, C).flatten(1, 2)
    plan = _make_plan(batch, A.numel(), x.shape[-1], x.device, torch.compiler.is_compiling())
    if torch.is_grad_enabled() and any(z.requires_grad for z in (x, delta, A, B, C)):
        y = _SelectiveScan.apply(x, delta, A, B, C, plan)
    else:
        y, _ = _scan(x, delta, A, B, C, plan)
    return y.flatten(1, 2)


def _choose_backend(x):
    # The compiler cannot look into kernels, and kernels have no float64, which is for checks of the mathematics.
    if x.device.type != "cuda" or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return "torch"
    return BACKEND or ("torch" if selective_scan_fn is None else "mamba_ssm")


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Scan every channel by the recurrence of Mamba.

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,    y_t = C_t h_t + D x_t,    from h = 0.

    Gu and Dao 2023, equation 2, with zero-order hold for A (equation 4) and its first-order form for B. The arithmetic
    is at least float32, even under autocast. No factor exceeds 1, so any decay is safe. The states of all steps never
    exist at the same time.

    Args:
        x: (batch, channels, length).
        delta: (batch, channels, length), positive, after softplus.
        A: (channels, states), negative.
        B: (batch, groups, states, length); channel c belongs to group c // (channels / groups).
        C: Shape as `B`.
        D: (channels,), or None for zeros.
        backend: "torch", "triton" or "mamba_ssm". With None, CUDA tensors use the environment variable
            UNCONCEAL_SCAN_BACKEND, otherwise the kernel of mamba_ssm if installed. Everything else, and compiled
            programs, use "torch".

    Returns:
        y, (batch, channels, length), in the dtype of `x`.

    Raises:
        ValueError: If shapes do not fit, or the backend is unknown or not installed.
    """
    _check_shapes(x, delta, A, B, C, D)
    backend = backend or _choose_backend(x)
    if backend not in ("torch", "triton", "mamba_ssm"):
        raise ValueError(f'backend: got "{backend}", expected "torch", "triton" or "mamba_ssm".')
    kernel = {"triton": selective_scan_triton, "mamba_ssm": selective_scan_fn}.get(backend, _portable_scan)
    if kernel is None:
        raise ValueError(f'backend: got "{backend}", which cannot be imported; install it or use "torch".')
    dtype, at_least = x.dtype, torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device.type):
        delta, A, B, C = (z.to(at_least) for z in (delta, A, B, C))
        # The portable scan converts x, the largest, one segment at a time.
        if kernel is not _portable_scan or torch.compiler.is_compiling():
            x = x.to(at_least)
        y = kernel(x, delta, A, B, C)
        if D is not None:
            y = torch.addcmul(y, x.to(at_least), D.to(at_least).unsqueeze(-1))
    return y.to(dtype)


def selective_scan_ref(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    """Slow reference of `selective_scan`: the definition, step by step."""
    dtype = x.dtype
    with without_autocast(x.device.type):
        x, delta, A, B, C = (z.to(torch.promote_types(dtype, torch.float32)) for z in (x, delta, A, B, C))
        B, C = (z.repeat_interleave(x.shape[1] // z.shape[1], dim=1) for z in (B, C))
        state = x.new_zeros(*x.shape[:2], A.shape[1])
        y = []
        # Not by index: then each step's gradient would be a tensor of the whole sequence.
        for x_t, delta_t, B_t, C_t in zip(*(z.unbind(-1) for z in (x, delta, B, C)), strict=True):
            delta_t = delta_t[..., None]
            state = torch.exp(delta_t * A) * state + delta_t * B_t * x_t[..., None]
            y.append((C_t * state).sum(-1))
        y = torch.stack(y, dim=-1)
        if D is not None:
            y = y + D.to(x.dtype).unsqueeze(-1) * x
    return y.to(dtype)
