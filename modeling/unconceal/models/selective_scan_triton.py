"""Triton kernels of the selective scan, for CUDA.

They are opt-in, because so far they have only run in Triton's interpreter. See `selective_scan` for the mathematics.
Importing this file raises ImportError without Triton.
"""

import torch
from torch.autograd.function import once_differentiable


# Without `try:`, transformers would refuse the model folder on machines without Triton.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise


# Steps between two kept states.
SEGMENT_STEPS = 16
# Channels that one program scans.
BLOCK_WIDTH = 16

# One program scans a block of channels of one sequence, step after step, with its states in registers. It writes only
# the state before each segment. The backward pass recomputes the states of a segment into `scratch`, which holds one
# segment. A block lies in one group. If the width of a group is not a multiple of the block, zeros pad the last one.


@triton.jit
def _places(channels, groups, num_states, length, BLOCK_CHANNELS: tl.constexpr, BLOCK_STATES: tl.constexpr):
    """Return masks and offsets of a program's channels and states."""
    batch = tl.program_id(0).to(tl.int64)
    width = channels // groups
    blocks = tl.cdiv(width, BLOCK_CHANNELS)
    group = tl.program_id(1) // blocks
    within = tl.program_id(1) % blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel = group * width + within
    index = tl.arange(0, BLOCK_STATES)
    tile = channel[:, None] * num_states + index[None, :]
    tile_mask = (within < width)[:, None] & (index < num_states)[None, :]
    row = (batch * channels + channel) * length
    projection = ((batch * groups + group) * num_states + index) * length
    return within < width, index < num_states, tile_mask, row, projection, tile


@triton.jit
def _forward_kernel(
    x_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, y_ptr, starts_ptr,
    channels, groups, num_states, length, num_segments,
    SEGMENT: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STATES: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    channel_mask, state_mask, tile_mask, row, projection, tile = _places(
        channels, groups, num_states, length, BLOCK_CHANNELS, BLOCK_STATES
    )
    A = tl.load(A_ptr + tile, mask=tile_mask, other=0.0)
    state = tl.zeros([BLOCK_CHANNELS, BLOCK_STATES], dtype=tl.float32)
    for segment in range(num_segments):
        first = segment * SEGMENT
        tl.store(starts_ptr + (batch * num_segments + segment) * channels * num_states + tile, state, mask=tile_mask)
        for t in range(first, tl.minimum(first + SEGMENT, length)):
            delta = tl.load(delta_ptr + row + t, mask=channel_mask, other=0.0)
            delta_x = delta * tl.load(x_ptr + row + t, mask=channel_mask, other=0.0)
            B = tl.load(B_ptr + projection + t, mask=state_mask, other=0.0)
            C = tl.load(C_ptr + projection + t, mask=state_mask, other=0.0)
            state = tl.exp(delta[:, None] * A) * state + delta_x[:, None] * B[None, :]
            tl.store(y_ptr + row + t, tl.sum(state * C[None, :], axis=1), mask=channel_mask)


@triton.jit
def _backward_kernel(
    grad_y_ptr, x_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, starts_ptr, scratch_ptr,
    grad_x_ptr, grad_delta_ptr, grad_A_ptr, grad_B_ptr, grad_C_ptr,
    channels, groups, num_states, length, num_segments,
    SEGMENT: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_STATES: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    channel_mask, state_mask, tile_mask, row, projection, tile = _places(
        channels, groups, num_states, length, BLOCK_CHANNELS, BLOCK_STATES
    )
    # One part of the gradients of B and C for each block: atomic sums would have a random order.
    part = ((batch * tl.num_programs(1) + tl.program_id(1)) * num_states + tl.arange(0, BLOCK_STATES)) * length
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
        # The next loop reads what other threads wrote.
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


class _SelectiveScan(torch.autograd.Function):
    """Scan by the kernels above. Tensors are float32, shapes as in `selective_scan`."""

    @staticmethod
    def _sizes(x, B):
        """Return the grid, sizes and constants of both kernels."""
        batch, channels, length = x.shape
        _, groups, num_states, _ = B.shape
        return (
            (batch, groups * triton.cdiv(channels // groups, BLOCK_WIDTH)),
            (channels, groups, num_states, length, triton.cdiv(length, SEGMENT_STEPS)),
            {
                "SEGMENT": SEGMENT_STEPS,
                "BLOCK_CHANNELS": BLOCK_WIDTH,
                "BLOCK_STATES": triton.next_power_of_2(num_states),
                "num_warps": 1,
            },
        )

    @staticmethod
    def forward(ctx, x, delta, A, B, C):
        x, delta, A, B, C = (z.contiguous() for z in (x, delta, A, B, C))
        grid, sizes, constants = _SelectiveScan._sizes(x, B)
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
        x, _, A, B, *_ = ctx.saved_tensors
        grid, sizes, constants = _SelectiveScan._sizes(x, B)
        batch, groups, num_states, length = B.shape
        scratch = x.new_empty(batch, SEGMENT_STEPS, *A.shape)
        grad_x, grad_delta, grad_A = torch.empty_like(x), torch.empty_like(x), x.new_empty(batch, *A.shape)
        grad_B, grad_C = (x.new_empty(batch, groups, grid[1] // groups, num_states, length) for _ in range(2))
        with torch.cuda.device_of(x):
            grads = (grad_x, grad_delta, grad_A, grad_B, grad_C)
            _backward_kernel[grid](grad_y.contiguous(), *ctx.saved_tensors, scratch, *grads, *sizes, **constants)
        return grad_x, grad_delta, grad_A.sum(0), grad_B.sum(2), grad_C.sum(2)


# Takes float32 tensors: x, delta, A, B and C of `selective_scan`. Returns y without D x.
selective_scan_triton = _SelectiveScan.apply
