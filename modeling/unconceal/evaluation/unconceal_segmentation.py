"""The protocol `segmentation` for `evaluate.load`; protocol_segmentation.py states it."""

from .base import Protocol
from .evaluate_module import ProtocolMetric
from .protocol_segmentation import PROTOCOL


class UnconcealSegmentation(ProtocolMetric):
    """The protocol `segmentation`."""

    protocol: Protocol = PROTOCOL
