"""The protocols by name, as recipes, scripts and reports call them."""

from . import cod, dis, segmentation
from .base import Protocol


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol for protocol in (segmentation.PROTOCOL, cod.PROTOCOL, dis.PROTOCOL)
}
