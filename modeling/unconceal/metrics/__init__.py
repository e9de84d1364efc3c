"""Evaluation protocols: one module a protocol, whose docstring is the protocol, and `evaluate_model` to run them."""

from .evaluation import evaluate_model
from .report import check_report_folder, format_table, write_report
from .segmentation import score_image, summarize


__all__ = [
    "check_report_folder",
    "evaluate_model",
    "format_table",
    "score_image",
    "summarize",
    "write_report",
]
