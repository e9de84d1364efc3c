"""The protocol `segmentation` for `evaluate.load`; segmentation.py states it."""

from .base import Protocol
from .module import ProtocolMetric
from .segmentation import PROTOCOL


class UnconcealSegmentation(ProtocolMetric):
    """The protocol `segmentation`."""

    protocol: Protocol = PROTOCOL
