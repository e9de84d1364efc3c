"""Save tiny networks for tests/bare_environment.py: save_tiny_models.py FOLDER."""

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


def make_image() -> Image.Image:
    """Make an image slightly larger than the input of the networks."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((70, 50), Image.Resampling.BICUBIC)


@torch.no_grad()
def make_tiny_model(name: str) -> PreTrainedModel:
    """Make a network that finds edges, so that refining has an effect."""
    model = TESTERS[name]().make_lively_model()
    if name == "opds":  # its mask is nearly flat
        head = model.levels[0].mask_head
        head.bias.sub_(model(**PROCESSOR(make_image())).logits.median()).mul_(6)
        head.weight.mul_(6)
    return model


def save_tiny_models(folder: Path) -> list[Path]:
    """Write folder/{opds,run,srs}: model, processor, image, expected results."""
    torch.set_num_threads(1)
    image = make_image()
    pixel_values = PROCESSOR(image).pixel_values
    for name in TESTERS:
        model = make_tiny_model(name)
        model.save_pretrained(folder / name)
        # Loaded, because files give weights at any address and some kernels then round differently.
        model = type(model).from_pretrained(folder / name)
        with torch.no_grad():
            logits = model(pixel_values).logits
        assert 0.1 < (logits > 0).float().mean() < 0.9, f"{name} finds an object nearly everywhere or nowhere"
        (refined,) = Segmenter(model, PROCESSOR).segment([enlarged(image)])
        PROCESSOR.save_pretrained(folder / name)
        image.save(folder / name / "image.png")
        expected = {"pixel_values": pixel_values, "logits": logits, "refined": torch.from_numpy(refined)}
        save_file(expected, folder / name / "expected.safetensors")
    return [folder / name for name in TESTERS]


if __name__ == "__main__":
    save_tiny_models(Path(sys.argv[1]))
