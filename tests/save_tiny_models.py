"""Save a tiny network of each kind with all that tests/bare_environment.py compares: save_tiny_models.py FOLDER."""

import sys
from pathlib import Path

import numpy as np
import torch
from bare_environment import enlarged
from PIL import Image
from safetensors.torch import save_file
from test_modeling_opds import TestOpdsForImageSegmentation
from test_modeling_run import TestRunForImageSegmentation
from test_modeling_srs import TestSrsForImageSegmentation
from transformers import PreTrainedModel

from unconceal import UnconcealImageProcessor
from unconceal.api import Segmenter


TESTERS = {
    "opds": TestOpdsForImageSegmentation,
    "run": TestRunForImageSegmentation,
    "srs": TestSrsForImageSegmentation,
}
PROCESSOR = UnconcealImageProcessor(size={"height": 64, "width": 64})


def make_picture() -> Image.Image:
    """Make a picture a little larger than the networks' size."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((70, 50), Image.Resampling.BICUBIC)


@torch.no_grad()
def make_tiny_model(name: str) -> PreTrainedModel:
    """Make a network of a kind that draws edges on the picture, to be looked at again where it is large."""
    model = TESTERS[name]().make_lively_model()
    if name == "opds":  # its last map is nearly flat
        head = model.levels[0].mask_head
        head.bias.sub_(model(**PROCESSOR(make_picture())).logits.median()).mul_(6)
        head.weight.mul_(6)
    return model


def save_tiny_models(folder: Path) -> list[Path]:
    """Write folder/{opds,run,srs}: weights, code, processor, `picture.png`, and what the network makes of it."""
    torch.set_num_threads(1)
    picture = make_picture()
    pixel_values = PROCESSOR(picture).pixel_values
    for name in TESTERS:
        model = make_tiny_model(name)
        with torch.no_grad():
            logits = model(pixel_values).logits
        assert 0.1 < (logits > 0).float().mean() < 0.9, f"{name} finds an object nearly everywhere or nowhere"
        (refined,) = Segmenter(model, PROCESSOR).segment([enlarged(picture)])
        model.save_pretrained(folder / name)
        PROCESSOR.save_pretrained(folder / name)
        picture.save(folder / name / "picture.png")
        expected = {"pixel_values": pixel_values, "logits": logits, "refined": torch.from_numpy(refined)}
        save_file(expected, folder / name / "expected.safetensors")
    return [folder / name for name in TESTERS]


if __name__ == "__main__":
    save_tiny_models(Path(sys.argv[1]))
