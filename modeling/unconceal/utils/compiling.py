"""Compile networks with torch.compile."""

import logging
import time

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from .errors import UserError, one_line
from .images import size_text


def compile_forward(network: nn.Module):
    """Compile the forward pass of a network, which then only predicts.

    The first batch of a size compiles the network. A line in the log says how long this took. After that, batches of
    any number of images run compiled. But a single image after larger batches runs uncompiled: one image is not worth
    minutes of compiling.
    """
    plain, compiled, known = network.forward, torch.compile(network.forward), set()

    def forward(pixel_values: torch.Tensor, **kwargs):
        batch_size, _, height, width = pixel_values.shape
        size = (batch_size > 1, height, width)
        if batch_size == 1 and (True, height, width) in known:
            return plain(pixel_values=pixel_values, **kwargs)
        if size in known:
            return compiled(pixel_values=pixel_values, **kwargs)
        if batch_size > 1:
            torch._dynamo.maybe_mark_dynamic(pixel_values, 0)  # the last batch may be smaller
        start = time.perf_counter()
        try:
            outputs = compiled(pixel_values=pixel_values, **kwargs)
        except TorchDynamoException as error:
            reason = one_line(error).partition(" Set TORCHDYNAMO")[0]
            what = f"cannot compile {type(network).__name__} on {pixel_values.device}: {reason}"
            raise UserError(f"{what}; install a C++ compiler, or leave out --compile") from error
        known.add(size)
        seconds, size = time.perf_counter() - start, size_text((width, height))
        log = logging.getLogger(__name__).warning  # shown by default
        log("compiled: the first batch of %d image(s) of %s took %.1f s", batch_size, size, seconds)
        return outputs

    network.forward = forward
