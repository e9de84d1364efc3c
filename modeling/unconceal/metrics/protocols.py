"""The protocols by name, as recipes, scripts and reports call them."""

from . import cod, dis, infrared, lesion, segmentation
from .base import Protocol


PROTOCOLS: dict[str, Protocol] = {
    module.PROTOCOL.name: module.PROTOCOL for module in (segmentation, cod, dis, infrared, lesion)
}
