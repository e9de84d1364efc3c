"""Offer the protocol `cod` to `evaluate.load`; see protocol_cod.py."""

# `evaluate` copies only the files named here, so name their imports too. It reads a comment on such a line as an
# address.
from .base import Protocol
from .evaluate_module import ProtocolMetric
from .protocol_cod import PROTOCOL
from .reading import to_mask


class UnconcealCod(ProtocolMetric):
    """The protocol `cod`."""

    protocol: Protocol = PROTOCOL
