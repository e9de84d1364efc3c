"""The protocol `cod` for `evaluate.load`; protocol_cod.py states it."""

from .base import Protocol
from .evaluate_module import ProtocolMetric
from .protocol_cod import PROTOCOL


class UnconcealCod(ProtocolMetric):
    """The protocol `cod`."""

    protocol: Protocol = PROTOCOL
