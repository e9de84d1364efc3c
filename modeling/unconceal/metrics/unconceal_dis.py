"""The protocol `dis` for `evaluate.load`; dis.py states it."""

# `evaluate` copies the files that this one names, so what those need is named too. It reads a comment on such a line as an
# address.
from .base import Protocol
from .cod import score_image
from .dis import PROTOCOL
from .module import ProtocolMetric


class UnconcealDis(ProtocolMetric):
    """The protocol `dis`."""

    protocol: Protocol = PROTOCOL
