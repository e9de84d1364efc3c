"""The protocol `lesion` for `evaluate.load`; lesion.py states it."""

# `evaluate` copies the files that this one names, so what those need is named too. It reads a comment on such a line as an
# address.
from .base import Protocol
from .lesion import PROTOCOL
from .module import ProtocolMetric
from .segmentation import score_image


class UnconcealLesion(ProtocolMetric):
    """The protocol `lesion`."""

    protocol: Protocol = PROTOCOL
