"""The protocol `dis` for `evaluate.load`; protocol_dis.py states it."""

# `evaluate` copies the files that this one names, so what those need is named too. It reads a comment on such a line as an
# address.
from .base import Protocol
from .evaluate_module import ProtocolMetric
from .protocol_cod import score_image
from .protocol_dis import PROTOCOL


class UnconcealDis(ProtocolMetric):
    """The protocol `dis`."""

    protocol: Protocol = PROTOCOL
