"""Offer the protocol `lesion` to `evaluate.load`; see protocol_lesion.py."""

# `evaluate` copies only the files named here, so name their imports too. It reads a comment on such a line as an
# address.
from .base import Protocol
from .evaluate_module import ProtocolMetric
from .protocol_lesion import PROTOCOL
from .protocol_segmentation import score_image
from .reading import to_mask


class UnconcealLesion(ProtocolMetric):
    """The protocol `lesion`."""

    protocol: Protocol = PROTOCOL
