"""Data sets: builders for raw folders, and generated scenes."""

from .builders import BUILDERS, Builder, Report, build, register
from .generated import build_synthetic, otsu_iou, otsu_table
from .pairs import Pair, UnusablePair
from .synthetic import KINDS, generate


__all__ = [
    "BUILDERS",
    "KINDS",
    "Builder",
    "Pair",
    "Report",
    "UnusablePair",
    "build",
    "build_synthetic",
    "generate",
    "otsu_iou",
    "otsu_table",
    "register",
]
