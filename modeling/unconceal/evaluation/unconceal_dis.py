"""Offer the protocol `dis` to `evaluate.load`; see protocol_dis.py."""

# `evaluate` copies only the files named here, so name their imports too. It reads a comment on such a line as an
# address.
from .base import Protocol
from .evaluate_module import ProtocolMetric
from .protocol_cod import score_image
from .protocol_dis import PROTOCOL
from .reading import to_mask


class UnconcealDis(ProtocolMetric):
    """The protocol `dis`."""

    protocol: Protocol = PROTOCOL
