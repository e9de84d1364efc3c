"""The protocol `cod` for `evaluate.load`; cod.py states it."""

from .base import Protocol
from .cod import PROTOCOL
from .module import ProtocolMetric


class UnconcealCod(ProtocolMetric):
    """The protocol `cod`."""

    protocol: Protocol = PROTOCOL
