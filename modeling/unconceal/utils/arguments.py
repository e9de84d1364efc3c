"""Types of command-line arguments. argparse shows a function's name in its messages."""

import argparse


def probability(text: str) -> float:
    """Parse a threshold in [0, 1). Nothing can be above 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to below 1")
    return value


FOREGROUND_HELP = "for masks that are maps of classes: the ids of the object, such as 1,2, or any for all but 0"


def class_ids(text: str) -> str | list[int]:
    """Parse ids of classes such as 1,2, or any."""
    if text != "any" and not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected ids such as 1,2, or any for all but 0")
    return text if text == "any" else [int(part) for part in text.split(",")]


def positive_int(text: str) -> int:
    """Parse a whole number from 1."""
    return count(text, least=1)


def count(text: str, least: int = 0) -> int:
    """Parse a whole number from `least`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from {least}")
    return int(text)
