"""Offer the protocol `infrared` to `evaluate.load`; see protocol_infrared.py."""

# `evaluate` copies only the files named here, so name their imports too. It reads a comment on such a line as an
# address.
from .base import Protocol
from .evaluate_module import ProtocolMetric
from .protocol_infrared import PROTOCOL
from .protocol_segmentation import score_image
from .reading import to_mask


class UnconcealInfrared(ProtocolMetric):
    """The protocol `infrared`."""

    protocol: Protocol = PROTOCOL
