"""Offer the protocol `cod` to `evaluate.load`; see protocol_cod.py."""

from .base import Protocol
from .evaluate_module import ProtocolMetric
from .protocol_cod import PROTOCOL


class UnconcealCod(ProtocolMetric):
    """The protocol `cod`."""

    protocol: Protocol = PROTOCOL
