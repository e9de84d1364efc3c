"""The protocol `infrared` for `evaluate.load`; infrared.py states it."""

# `evaluate` copies the files that this one names, so what those need is named too. It reads a comment on such a line as an
# address.
from .base import Protocol
from .infrared import PROTOCOL
from .module import ProtocolMetric
from .segmentation import score_image


class UnconcealInfrared(ProtocolMetric):
    """The protocol `infrared`."""

    protocol: Protocol = PROTOCOL
