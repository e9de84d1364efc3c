"""Evaluation protocols: one module a protocol, whose docstring is the protocol, and `evaluate_model` to run them."""

from .base import Protocol
from .evaluation import evaluate_model
from .protocols import PROTOCOLS
from .report import check_report_folder, write_report


__all__ = [
    "PROTOCOLS",
    "Protocol",
    "check_report_folder",
    "evaluate_model",
    "write_report",
]
