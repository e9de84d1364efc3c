"""Offer the protocol `segmentation` to `evaluate.load`; see protocol_segmentation.py."""

# `evaluate` copies only the files named here, so name their imports too. It reads a comment on such a line as an
# address.
from .base import Protocol
from .evaluate_module import ProtocolMetric
from .protocol_segmentation import PROTOCOL
from .reading import to_mask


class UnconcealSegmentation(ProtocolMetric):
    """The protocol `segmentation`."""

    protocol: Protocol = PROTOCOL
