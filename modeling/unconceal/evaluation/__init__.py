"""Evaluation protocols: one module a protocol, whose docstring is the protocol, and what runs them.

`evaluate_model` scores a network, `PredictionFolder` mask files of any method; `write_report` keeps the result.
"""

from .base import Protocol
from .mask_files import PredictionFolder
from .networks import evaluate_model
from .protocols import PROTOCOLS
from .report import check_report_folder, format_table, write_report


__all__ = [
    "PROTOCOLS",
    "PredictionFolder",
    "Protocol",
    "check_report_folder",
    "evaluate_model",
    "format_table",
    "write_report",
]
