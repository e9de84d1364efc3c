"""Types of command-line arguments. argparse shows a function's name in its messages."""

import argparse


def probability(text: str) -> float:
    """Parse a threshold in [0, 1). Nothing can be above 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to below 1")
    return value


def positive_int(text: str) -> int:
    """Parse a whole number from 1."""
    return count(text, least=1)


def count(text: str, least: int = 0) -> int:
    """Parse a whole number from `least`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from {least}")
    return int(text)
