"""Keep what stands on the card in a repository."""

import logging
import re

from huggingface_hub import ModelCard, RepoCard
from yaml import YAMLError

from ..utils.errors import UserError
from ..utils.signatures import read_signature


logger = logging.getLogger(__name__)

CARD = "README.md"
RESULTS = re.compile(r"^## Results\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def kept_license(present: str | None, repo_id: str) -> str | None:
    """Return the license of the card in a repository, or None.

    Args:
        present: That card, or None without one.
        repo_id: The repository, for the message.

    Raises:
        UserError: If people wrote or edited that card, so a new one would lose something.
    """
    if present is None:
        return None
    try:
        card = RepoCard(present, ignore_metadata_errors=True)
        header, is_new = card.data.to_dict(), not card.text.strip()  # the Hub makes cards that hold only a license
    except (ValueError, TypeError, YAMLError):
        header, is_new = {}, False
    if not (is_new and header.keys() <= {"license"}) and not read_signature(present):
        raise UserError(
            f"the card of {repo_id} was written or edited there; save what you need of its {CARD}, remove the file "
            "there and push again (a model can instead be sent with your own card, --card FILE)"
        )
    license = header.get("license")
    return None if license == "unknown" else license


def with_kept_results(text: str, present: str | None, weights: str) -> str:
    """Return a card with the present results of the same weights."""
    found = read_signature(present or "")
    held = found and RESULTS.search(found["text"])
    before = ModelCard(found["text"], ignore_metadata_errors=True) if held else None
    if before is None or not before.data.eval_results:
        return text
    if found["weights"] != weights:
        logger.warning(
            "the results on the card there are of other weights and are dropped; give new ones with --results"
        )
        return text
    card = ModelCard(text)
    card.data.model_name, card.data.eval_results = before.data.model_name, before.data.eval_results
    card.text = RESULTS.sub(lambda _: held[0], card.text, count=1)
    return str(card)
