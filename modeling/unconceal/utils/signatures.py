"""Sign the cards that we write, so that edited ones are recognized."""

import hashlib
import re


# The last line of a card. Markdown does not show it.
_SIGNATURE = "<!-- Unconceal wrote this card{weights}. SHA-256 of what is above: {digest} -->\n"
_LINE = (
    r"<!-- Unconceal wrote this card(?: for the weights (?P<weights>\w+))?\. SHA-256 of what is above: "
    r"(?P<digest>\w+) -->\n"
)
_SIGNED = re.compile(rf"(?P<text>.*){_LINE}", re.DOTALL)


def sign(text: str, weights: str | None = None) -> str:
    """Add a signature, or replace the one that is there.

    `weights` is the SHA-256 of the weights that the card is about.
    """
    text = f"{re.sub(_LINE, '', text).rstrip()}\n\n"
    weights = f" for the weights {weights}" if weights else ""
    return text + _SIGNATURE.format(weights=weights, digest=_digest(text))


def is_unedited(text: str) -> bool:
    """Return whether a card is as `sign` left it."""
    return read_signature(text) is not None


def read_signature(text: str) -> re.Match | None:
    """Return `text` and `weights` of an unedited card, otherwise None."""
    found = _SIGNED.fullmatch(text)
    return found if found and _digest(found["text"]) == found["digest"] else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
