"""The protocol `infrared` for `evaluate.load`; protocol_infrared.py states it."""

# `evaluate` copies the files that this one names, so what those need is named too. It reads a comment on such a line as an
# address.
from .base import Protocol
from .evaluate_module import ProtocolMetric
from .protocol_infrared import PROTOCOL
from .protocol_segmentation import score_image


class UnconcealInfrared(ProtocolMetric):
    """The protocol `infrared`."""

    protocol: Protocol = PROTOCOL
