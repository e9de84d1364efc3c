"""List the protocols by name."""

from . import protocol_cod, protocol_dis, protocol_infrared, protocol_lesion, protocol_segmentation
from .base import Protocol


PROTOCOLS: dict[str, Protocol] = {
    module.PROTOCOL.name: module.PROTOCOL
    for module in (protocol_segmentation, protocol_cod, protocol_dis, protocol_infrared, protocol_lesion)
}
