"""Selective scan: the linear recurrence of a state-space model whose step and projections vary along the sequence.

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

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


try:
    from torch._higher_order_ops.scan import scan as loop
    from torch.compiler import is_exporting
except ImportError:  # before torch 2.7
    loop = None

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# Inside, a tensor is "time-major" when it reads (time, rows, groups, ...): one step is then one contiguous block. A row
# is one sequence, or one chunk of a sequence where sequences are cut. A state is (rows, groups, states, width), where
# width = channels / groups is innermost, so that every operation of a step runs along contiguous memory.


class _Plan(NamedTuple):
    """How the work is divided; `_make_plan` says why.

    Args:
        rows: Sequences of the batch that go together, or None for all.
        num_chunks: Chunks that a sequence is cut into; they are stepped all at once, in two passes when more than one.
        segment: Steps whose states exist at the same time.
        num_segments: Segments of a chunk.
        doublings: Passes that carry states over chunks, enough for 2^doublings chunks; 0 where there is only one.
        traced: Whether the program is being compiled, or exported by a torch without loops.
    """

    rows: int | None
    num_chunks: int
    segment: int
    num_segments: int
    doublings: int
    traced: bool


# In a traced program no Python loop may have a count that depends on the length, so the counts are fixed.
TRACED_SEGMENT = 4
TRACED_NUM_SEGMENTS = 4
TRACED_DOUBLINGS = 14
MAX_TRACED_LENGTH = TRACED_SEGMENT * TRACED_NUM_SEGMENTS * (2**TRACED_DOUBLINGS - 1)
# On a GPU a launch costs more than the work of a step.
CUDA_SEGMENT = 8
CUDA_NUM_SEGMENTS = 8
# On a CPU: the longest segment; elements of a step below which it is mostly call overhead; elements of a segment of
# states that stay in the cache.
CPU_SEGMENT = 16
CPU_MIN_STEP = 2**12
CPU_CACHE = 2**18
# Of the Triton kernels: steps between two kept states, channels that one program scans.
TRITON_SEGMENT = 16
TRITON_CHANNELS = 16


def _check_shapes(x, delta, A, B, C, D):
    if x.ndim != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (batch, channels, length)")
    batch, channels, length = x.shape
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"A: got shape {tuple(A.shape)}, expected ({channels}, states)")
    if B.ndim != 4 or channels % B.shape[1] != 0:
        raise ValueError(
            f"B: got shape {tuple(B.shape)}, expected (batch, groups, states, length), groups a divisor of {channels}"
        )
    projection = (batch, B.shape[1], A.shape[1], length)
    for name, tensor, expected in (
        ("delta", delta, (batch, channels, length)),
        ("B", B, projection),
        ("C", C, projection),
        ("D", D, (channels,)),
    ):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(expected)}")


def _no_autocast(device_type):
    # Entered only where needed: it would be a node of its own in an exported program.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _make_plan(batch, step, length, device, traced):
    """Divide the scan of (batch, length) states of `step` elements."""
    if traced:
        if length > MAX_TRACED_LENGTH:
            raise ValueError(f"length: got {length}, expected at most {MAX_TRACED_LENGTH} in a compiled program")
        chunk = TRACED_SEGMENT * TRACED_NUM_SEGMENTS
        # One chunk more than needed: a count that can be 1 would be taken for the constant 1.
        num_chunks = (length + 2 * chunk - 1) // chunk
        return _Plan(None, num_chunks, TRACED_SEGMENT, TRACED_NUM_SEGMENTS, TRACED_DOUBLINGS, True)
    if device.type == "cpu":
        rows = min(batch, max(1, CPU_CACHE // (step * CPU_SEGMENT)))
        # Not from the batch: a sequence is cut alike alone and in a batch.
        segment, max_segments = CPU_SEGMENT, -(-length * step // (CPU_MIN_STEP * CPU_SEGMENT))
    else:
        rows, segment, max_segments = None, CUDA_SEGMENT, CUDA_NUM_SEGMENTS
    # Chunks, segments and steps in equal parts, to pad little.
    num_chunks = -(-length // (segment * max_segments))
    num_segments = -(-length // (num_chunks * segment))
    segment = -(-length // (num_chunks * num_segments))
    return _Plan(rows, num_chunks, segment, num_segments, (num_chunks - 1).bit_length(), False)


def _time_major(z, plan):
    """(batch, groups, width, length), padded with zeros, to (chunk length, batch * chunks, groups, width)."""
    batch, groups, width, length = z.shape
    chunk = plan.segment * plan.num_segments
    # A transposed matrix is copied fast, a permuted tensor of more dimensions is not.
    z = z.reshape(-1, length).t().contiguous()
    if plan.traced or length % chunk:
        z = F.pad(z, (0, 0, 0, plan.num_chunks * chunk - length))
    z = z.view(-1, chunk, batch, groups * width).permute(1, 2, 0, 3)
    return z.reshape(chunk, -1, groups, width)


def _batch_major(z, plan, batch, length):
    """Undo `_time_major`."""
    chunk, _, groups, width = z.shape
    z = z.view(chunk, batch, -1, groups * width).permute(2, 0, 1, 3).flatten(0, 1).flatten(1, 2)
    # A slice makes torch.export ask for a proof that the padded length is the longer one.
    z = z.index_select(0, torch.arange(length, device=z.device)) if plan.traced else z[:length]
    return z.t().contiguous().view(batch, groups, width, length)


def _carry(decay, end, plan, reverse=False):
    """Return the state before each chunk (after it, if in reverse), (rows, groups, states, width).

    Args:
        decay: Factor of a chunk on the state before it, exp(A sum delta); shape as the result.
        end: State after each chunk, had it begun at zero; shape as the result.
        plan: The chunks.
        reverse: Whether the last chunk comes first.
    """
    decay, end = (z.unflatten(0, (z.shape[0] // plan.num_chunks, plan.num_chunks)) for z in (decay, end))
    if reverse:
        decay, end = decay.flip(1), end.flip(1)
    index = torch.arange(plan.num_chunks, device=end.device)
    is_first = (index == 0).view(-1, 1, 1, 1)
    # Nothing comes before the first chunk. As every product that reaches beyond it has this factor, the clamped index
    # below needs no mask.
    decay = decay.masked_fill(is_first, 0)
    for doubling in range(plan.doublings):
        source = (index - 2**doubling).clamp(min=0)
        end = torch.addcmul(end, decay, end.index_select(1, source))
        decay = decay * decay.index_select(1, source)
    start = end.index_select(1, (index - 1).clamp(min=0)).masked_fill(is_first, 0)
    return (start.flip(1) if reverse else start).flatten(0, 1)


class _Steps(NamedTuple):
    """A (time, rows, groups, states, width) tensor and its steps."""

    whole: torch.Tensor
    each: tuple[torch.Tensor, ...]


def _workspace(count, state, plan):
    """Memory for segments, used again and again: fresh memory costs more than what is computed into it."""
    if plan.traced:
        return [None] * count
    buffers = (state.new_empty(plan.segment, *state.shape) for _ in range(count))
    return [_Steps(buffer, buffer.unbind()) for buffer in buffers]


def _outer(per_width, other, out):
    """(time, rows, groups, width) times states, in the memory of `out` where there is one."""
    return torch.mul(per_width.unsqueeze(-2), other, out=None if out is None else out.whole)


def _decays(delta, A, out):
    """exp(delta A)."""
    decays = _outer(delta, A, out).exp_()
    return _Steps(decays, decays.unbind()) if out is None else out


def _total_decay(delta, A):
    """Factor of a whole chunk on the state before it, (rows, groups, states, width)."""
    return (delta.sum(0).unsqueeze(-2) * A).exp_()


def _recur(summands, factors, first, in_place):
    """Compute r_t = summand_t + factor_t r_{t-1} from r_{-1} = `first`. Return all r."""
    results = []
    for summand, factor in zip(summands, factors, strict=True):
        first = torch.addcmul(summand, factor, first, out=summand if in_place else None)
        results.append(first)
    return results


def _states(decays, delta_x, B, state, out):
    """Step through a segment from `state`; return its states."""
    summands = _outer(delta_x, B.unsqueeze(-1), out)
    each = _recur(summands.unbind() if out is None else out.each, decays.each, state, out is not None)
    return _Steps(torch.stack(each), each) if out is None else out


def _grad_states(decays, grad_y, C, carry, out):
    """Step back through a segment. Return the gradients of its states and of the state before it.

    `carry` is the gradient that reaches the last state from the segment after this one.
    """
    summands = _outer(grad_y, C.unsqueeze(-1), out)
    summands = summands.unbind() if out is None else out.each
    last = torch.add(summands[-1], carry, out=None if out is None else summands[-1])
    each = [last, *_recur(summands[-2::-1], decays.each[:0:-1], last, out is not None)]
    return torch.stack(each[::-1]) if out is None else out.whole, decays.each[0] * each[-1]


def _segments(plan, *tensors):
    return list(zip(*(z.split(plan.segment) for z in tensors), strict=True))


def _scan_rows(x, delta, A, B, C, plan):
    """Scan (batch, groups, width, length). Return y, alike, and the state before each segment."""
    batch, length = x.shape[0], x.shape[-1]
    x, delta, B, C = (_time_major(z, plan) for z in (x, delta, B, C))
    delta_x = delta * x
    state = A.new_zeros(x.shape[1], *A.shape)
    decays_out, states_out = _workspace(2, state, plan)
    if plan.doublings:
        for delta_s, delta_x_s, B_s in _segments(plan, delta, delta_x, B):
            decays = _decays(delta_s, A, decays_out)
            state = _states(decays, delta_x_s, B_s, state, states_out).each[-1].clone()
        state = _carry(_total_decay(delta, A), state, plan)
    y, starts = [], []
    for delta_s, delta_x_s, B_s, C_s in _segments(plan, delta, delta_x, B, C):
        starts.append(state)
        decays = _decays(delta_s, A, decays_out)
        states = _states(decays, delta_x_s, B_s, state, states_out)
        y.append((C_s.unsqueeze(-2) @ states.whole).squeeze(-2))
        state = states.each[-1].clone()
    return _batch_major(torch.cat(y), plan, batch, length), starts


def _scan_rows_backward(grad_y, x, delta, A, B, C, starts, plan):
    """Return the gradients of x, delta, A, B and C; shapes as in `_scan_rows`."""
    batch, length = x.shape[0], x.shape[-1]
    grad_y, x, delta, B, C = (_time_major(z, plan) for z in (grad_y, x, delta, B, C))
    delta_x = delta * x
    carry = A.new_zeros(x.shape[1], *A.shape)
    decays_out, states_out, grads_out = _workspace(3, carry, plan)
    if plan.doublings:
        for delta_s, grad_y_s, C_s in _segments(plan, delta, grad_y, C)[::-1]:
            _, carry = _grad_states(_decays(delta_s, A, decays_out), grad_y_s, C_s, carry, grads_out)
        carry = _carry(_total_decay(delta, A), carry, plan, reverse=True)
    grad_A = torch.zeros_like(A)
    parts = []
    for (delta_s, delta_x_s, B_s, C_s, grad_y_s), start in zip(
        _segments(plan, delta, delta_x, B, C, grad_y)[::-1], starts[::-1], strict=True
    ):
        decays = _decays(delta_s, A, decays_out)
        states = _states(decays, delta_x_s, B_s, start, states_out).whole
        grads, carry = _grad_states(decays, grad_y_s, C_s, carry, grads_out)
        # A row times a transposed matrix: several times faster than the matrix times a column.
        grad_C = (grad_y_s.unsqueeze(-2) @ states.mT).squeeze(-2)
        grad_B = (delta_x_s.unsqueeze(-2) @ grads.mT).squeeze(-2)
        grad_delta_x = (B_s.unsqueeze(-2) @ grads).squeeze(-2)
        # Gradient of the exponent delta A: that of the decay, which is grad times the previous state, times the decay.
        grads.mul_(decays.whole)
        grads[1:].mul_(states[:-1])
        grads[0].mul_(start)
        grad_A += _outer(delta_s, grads, decays_out).sum((0, 1))
        grad_delta = grads.mul_(A).sum(-2)
        parts.append((grad_delta_x, grad_delta, grad_B, grad_C))
    grad_delta_x, grad_delta, grad_B, grad_C = (torch.cat(part[::-1]) for part in zip(*parts, strict=True))
    grad_delta.addcmul_(grad_delta_x, x)
    grad_x = grad_delta_x.mul_(delta)
    grad_x, grad_delta, grad_B, grad_C = (
        _batch_major(z, plan, batch, length) for z in (grad_x, grad_delta, grad_B, grad_C)
    )
    return grad_x, grad_delta, grad_A, grad_B, grad_C


def _split_rows(plan, *tensors):
    return list(zip(*([z] if plan.rows is None else z.split(plan.rows) for z in tensors), strict=True))


def _cat_rows(parts):
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _scan(x, delta, A, B, C, plan):
    """Scan all rows. Return y and, for each split of the batch, the states before its segments."""
    y, starts = zip(
        *(_scan_rows(x, delta, A, B, C, plan) for x, delta, B, C in _split_rows(plan, x, delta, B, C)), strict=True
    )
    return _cat_rows(y), starts


class _SelectiveScan(torch.autograd.Function):
    """The scan of (batch, groups, width, length), with a backward pass that computes the states anew."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, plan):
        y, starts = _scan(x, delta, A, B, C, plan)
        ctx.plan = plan
        ctx.save_for_backward(x, delta, A, B, C, *(torch.stack(part) for part in starts))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, delta, A, B, C, *starts = ctx.saved_tensors
        with _no_autocast(x.device.type):
            parts = [
                _scan_rows_backward(*part[:3], A, *part[3:], start.unbind(), ctx.plan)
                for part, start in zip(_split_rows(ctx.plan, grad_y, x, delta, B, C), starts, strict=True)
            ]
        grad_x, grad_delta, grad_A, grad_B, grad_C = zip(*parts, strict=True)
        return _cat_rows(grad_x), _cat_rows(grad_delta), sum(grad_A), _cat_rows(grad_B), _cat_rows(grad_C), None


if triton is not None:
    # One program scans a block of channels of one sequence, one step after another, its states in registers. Nothing
    # but the state before each segment is written, and the backward pass computes a segment's states anew into
    # `scratch`, which is as long as a segment. A block lies in one group; where the group's width is not a multiple of
    # the block, the last one is padded with channels that are zero throughout.

    @triton.jit
    def _forward_kernel(
        x_ptr,
        delta_ptr,
        A_ptr,
        B_ptr,
        C_ptr,
        y_ptr,
        starts_ptr,
        channels,
        groups,
        num_states,
        length,
        num_segments,
        SEGMENT: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr,
        BLOCK_STATES: tl.constexpr,
    ):
        batch = tl.program_id(0).to(tl.int64)
        width = channels // groups
        blocks = tl.cdiv(width, BLOCK_CHANNELS)
        group = tl.program_id(1) // blocks
        within = tl.program_id(1) % blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        channel = group * width + within
        channel_mask = within < width
        index = tl.arange(0, BLOCK_STATES)
        state_mask = index < num_states
        tile = channel[:, None] * num_states + index[None, :]
        tile_mask = channel_mask[:, None] & state_mask[None, :]
        row = (batch * channels + channel) * length
        projection = ((batch * groups + group) * num_states + index) * length
        A = tl.load(A_ptr + tile, mask=tile_mask, other=0.0)
        state = tl.zeros([BLOCK_CHANNELS, BLOCK_STATES], dtype=tl.float32)
        for segment in range(num_segments):
            first = segment * SEGMENT
            tl.store(
                starts_ptr + (batch * num_segments + segment) * channels * num_states + tile, state, mask=tile_mask
            )
            for t in range(first, tl.minimum(first + SEGMENT, length)):
                delta = tl.load(delta_ptr + row + t, mask=channel_mask, other=0.0)
                delta_x = delta * tl.load(x_ptr + row + t, mask=channel_mask, other=0.0)
                B = tl.load(B_ptr + projection + t, mask=state_mask, other=0.0)
                C = tl.load(C_ptr + projection + t, mask=state_mask, other=0.0)
                state = tl.exp(delta[:, None] * A) * state + delta_x[:, None] * B[None, :]
                tl.store(y_ptr + row + t, tl.sum(state * C[None, :], axis=1), mask=channel_mask)

    @triton.jit
    def _backward_kernel(
        grad_y_ptr,
        x_ptr,
        delta_ptr,
        A_ptr,
        B_ptr,
        C_ptr,
        starts_ptr,
        scratch_ptr,
        grad_x_ptr,
        grad_delta_ptr,
        grad_A_ptr,
        grad_B_ptr,
        grad_C_ptr,
        channels,
        groups,
        num_states,
        length,
        num_segments,
        SEGMENT: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr,
        BLOCK_STATES: tl.constexpr,
    ):
        batch = tl.program_id(0).to(tl.int64)
        width = channels // groups
        blocks = tl.cdiv(width, BLOCK_CHANNELS)
        group = tl.program_id(1) // blocks
        within = tl.program_id(1) % blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        channel = group * width + within
        channel_mask = within < width
        index = tl.arange(0, BLOCK_STATES)
        state_mask = index < num_states
        tile = channel[:, None] * num_states + index[None, :]
        tile_mask = channel_mask[:, None] & state_mask[None, :]
        row = (batch * channels + channel) * length
        projection = ((batch * groups + group) * num_states + index) * length
        # Every block has its own part of the gradients of B and C: adding in place would make sums of random order.
        part = ((batch * tl.num_programs(1) + tl.program_id(1)) * num_states + index) * length
        A = tl.load(A_ptr + tile, mask=tile_mask, other=0.0)
        grad_A = tl.zeros([BLOCK_CHANNELS, BLOCK_STATES], dtype=tl.float32)
        grad = tl.zeros([BLOCK_CHANNELS, BLOCK_STATES], dtype=tl.float32)
        for back in range(num_segments):
            segment = num_segments - 1 - back
            first = segment * SEGMENT
            steps = tl.minimum(SEGMENT, length - first)
            state = tl.load(
                starts_ptr + (batch * num_segments + segment) * channels * num_states + tile, mask=tile_mask, other=0.0
            )
            for i in range(steps):
                tl.store(scratch_ptr + (batch * SEGMENT + i) * channels * num_states + tile, state, mask=tile_mask)
                delta = tl.load(delta_ptr + row + first + i, mask=channel_mask, other=0.0)
                delta_x = delta * tl.load(x_ptr + row + first + i, mask=channel_mask, other=0.0)
                B = tl.load(B_ptr + projection + first + i, mask=state_mask, other=0.0)
                state = tl.exp(delta[:, None] * A) * state + delta_x[:, None] * B[None, :]
            # What one thread wrote another may read.
            tl.debug_barrier()
            for j in range(steps):
                i = steps - 1 - j
                t = first + i
                previous = tl.load(
                    scratch_ptr + (batch * SEGMENT + i) * channels * num_states + tile, mask=tile_mask, other=0.0
                )
                grad_y = tl.load(grad_y_ptr + row + t, mask=channel_mask, other=0.0)
                x = tl.load(x_ptr + row + t, mask=channel_mask, other=0.0)
                delta = tl.load(delta_ptr + row + t, mask=channel_mask, other=0.0)
                B = tl.load(B_ptr + projection + t, mask=state_mask, other=0.0)
                C = tl.load(C_ptr + projection + t, mask=state_mask, other=0.0)
                delta_x = delta * x
                decay = tl.exp(delta[:, None] * A)
                kept = decay * previous
                state = kept + delta_x[:, None] * B[None, :]
                grad += grad_y[:, None] * C[None, :]
                grad_exponent = grad * kept
                grad_delta_x = tl.sum(grad * B[None, :], axis=1)
                grad_delta = grad_delta_x * x + tl.sum(grad_exponent * A, axis=1)
                grad_A += grad_exponent * delta[:, None]
                tl.store(grad_x_ptr + row + t, grad_delta_x * delta, mask=channel_mask)
                tl.store(grad_delta_ptr + row + t, grad_delta, mask=channel_mask)
                tl.store(grad_B_ptr + part + t, tl.sum(grad * delta_x[:, None], axis=0), mask=state_mask)
                tl.store(grad_C_ptr + part + t, tl.sum(state * grad_y[:, None], axis=0), mask=state_mask)
                grad *= decay
            tl.debug_barrier()
        tl.store(grad_A_ptr + batch * channels * num_states + tile, grad_A, mask=tile_mask)


class _TritonSelectiveScan(torch.autograd.Function):
    """The scan by the two kernels above. All tensors float32; shapes as in `selective_scan`."""

    @staticmethod
    def _sizes(x, B):
        """Return the grid, the integer arguments and the constants that both kernels take."""
        batch, channels, length = x.shape
        _, groups, num_states, _ = B.shape
        return (
            (batch, groups * triton.cdiv(channels // groups, TRITON_CHANNELS)),
            (channels, groups, num_states, length, triton.cdiv(length, TRITON_SEGMENT)),
            {
                "SEGMENT": TRITON_SEGMENT,
                "BLOCK_CHANNELS": TRITON_CHANNELS,
                "BLOCK_STATES": triton.next_power_of_2(num_states),
                "num_warps": 1,
            },
        )

    @staticmethod
    def forward(ctx, x, delta, A, B, C):
        x, delta, A, B, C = (z.contiguous() for z in (x, delta, A, B, C))
        grid, sizes, constants = _TritonSelectiveScan._sizes(x, B)
        y = torch.empty_like(x)
        starts = x.new_empty(x.shape[0], sizes[-1], *A.shape)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(x):
            _forward_kernel[grid](x, delta, A, B, C, y, starts, *sizes, **constants)
        ctx.save_for_backward(x, delta, A, B, C, starts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, delta, A, B, C, starts = ctx.saved_tensors
        grid, sizes, constants = _TritonSelectiveScan._sizes(x, B)
        batch, groups, num_states, length = B.shape
        scratch = x.new_empty(batch, TRITON_SEGMENT, *A.shape)
        grad_x, grad_delta, grad_A = torch.empty_like(x), torch.empty_like(x), x.new_empty(batch, *A.shape)
        grad_B, grad_C = (x.new_empty(batch, groups, grid[1] // groups, num_states, length) for _ in range(2))
        with torch.cuda.device_of(x):
            _backward_kernel[grid](
                grad_y.contiguous(),
                x,
                delta,
                A,
                B,
                C,
                starts,
                scratch,
                grad_x,
                grad_delta,
                grad_A,
                grad_B,
                grad_C,
                *sizes,
                **constants,
            )
        return grad_x, grad_delta, grad_A.sum(0), grad_B.sum(2), grad_C.sum(2)


def _exported_scan(x, delta, A, B, C):
    """Scan (batch, groups, width, length) by a loop of the program itself, which becomes ONNX's own Scan.

    A plan's steps would be thousands of nodes, which exporters take minutes to optimise and runtimes run one by one.
    """

    def step(state, now):
        delta, delta_x, B, C = now
        decay = torch.exp(delta.unsqueeze(-2) * A)
        state = torch.addcmul(delta_x.unsqueeze(-2) * B.unsqueeze(-1), decay, state)
        return state, (C.unsqueeze(-2) @ state).squeeze(-2)

    inputs = tuple(z.permute(3, 0, 1, 2).contiguous() for z in (delta, delta * x, B, C))
    _, y = loop(step, A.new_zeros(x.shape[0], *A.shape), inputs)
    return y.permute(1, 2, 3, 0).contiguous()  # else its strides would tie the program to a batch size


def _portable_scan(x, delta, A, B, C):
    """The scan by operations of PyTorch alone. Shapes as in `selective_scan`."""
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
    # Compiling needs operations that the compiler can look into; float64 is for checks of the mathematics.
    if x.device.type != "cuda" or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return "torch"
    if selective_scan_fn is not None:
        return "mamba_ssm"
    return "torch" if triton is None else "triton"


def selective_scan(
    x: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Scan every channel: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t and y_t = C_t h_t + D x_t, from h = 0.

    Gu and Dao 2023, equation 2, with A discretised by zero-order hold (equation 4) and B by its first-order form. The
    arithmetic is float32 at least, under autocast too. No factor ever exceeds 1, so any decay is safe, and the states
    of all steps never exist at the same time.

    Args:
        x: (batch, channels, length).
        delta: (batch, channels, length), positive: the caller has applied softplus.
        A: (channels, states), negative.
        B: (batch, groups, states, length); channel c belongs to group c // (channels / groups).
        C: As `B`.
        D: (channels,), or None for zeros.
        backend: "torch", "triton" or "mamba_ssm"; None takes mamba_ssm's kernel or else Triton's where they can be
            imported and `x` is on a CUDA device, and "torch" everywhere else and in compiled programs.

    Returns:
        y, (batch, channels, length), in the dtype of `x`.

    Raises:
        ValueError: For shapes that do not fit, and for an unknown backend.
    """
    _check_shapes(x, delta, A, B, C, D)
    backend = backend or _choose_backend(x)
    dtype = x.dtype
    with _no_autocast(x.device.type):
        x, delta, A, B, C = (z.to(torch.promote_types(dtype, torch.float32)) for z in (x, delta, A, B, C))
        if backend == "torch":
            y = _portable_scan(x, delta, A, B, C)
        elif backend == "triton":
            y = _TritonSelectiveScan.apply(x, delta, A, B, C)
        elif backend == "mamba_ssm":
            y = selective_scan_fn(x, delta, A, B, C)
        else:
            raise ValueError(f'backend: got "{backend}", expected "torch", "triton" or "mamba_ssm"')
        if D is not None:
            y = torch.addcmul(y, x, D.to(x.dtype).unsqueeze(-1))
    return y.to(dtype)


def selective_scan_ref(
    x: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same as `selective_scan` by the definition, one step after another: slow, and easy to trust."""
    dtype = x.dtype
    with _no_autocast(x.device.type):
        x, delta, A, B, C = (z.to(torch.promote_types(dtype, torch.float32)) for z in (x, delta, A, B, C))
        B, C = (z.repeat_interleave(x.shape[1] // z.shape[1], dim=1) for z in (B, C))
        state = x.new_zeros(*x.shape[:2], A.shape[1])
        y = []
        for t in range(x.shape[-1]):
            delta_t = delta[..., t, None]
            state = torch.exp(delta_t * A) * state + delta_t * B[..., t] * x[..., t, None]
            y.append((C[..., t] * state).sum(-1))
        y = torch.stack(y, dim=-1)
        if D is not None:
            y = y + D.to(x.dtype).unsqueeze(-1) * x
    return y.to(dtype)


__all__ = ["selective_scan", "selective_scan_ref"]
