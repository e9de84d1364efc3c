"""Offer the protocol `segmentation` to `evaluate.load`; see protocol_segmentation.py."""

from .base import Protocol
from .evaluate_module import ProtocolMetric
from .protocol_segmentation import PROTOCOL


class UnconcealSegmentation(ProtocolMetric):
    """The protocol `segmentation`."""

    protocol: Protocol = PROTOCOL
