"""Save a tiny network of each kind with all that tests/bare_environment.py compares: save_tiny_models.py FOLDER."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from test_modeling_opds import TestOpdsForImageSegmentation
from test_modeling_run import TestRunForImageSegmentation
from test_modeling_srs import TestSrsForImageSegmentation

from unconceal import UnconcealImageProcessor


TESTERS = {
    "opds": TestOpdsForImageSegmentation,
    "run": TestRunForImageSegmentation,
    "srs": TestSrsForImageSegmentation,
}


def save_tiny_models(folder: Path) -> list[Path]:
    """Write folder/{opds,run,srs}: weights, code, processor, `picture.png`, and what the network makes of it."""
    torch.set_num_threads(1)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((70, 50), Image.Resampling.BICUBIC)
    processor = UnconcealImageProcessor(size={"height": 64, "width": 64})
    pixel_values = processor(picture).pixel_values
    for name, tester in TESTERS.items():
        model = tester().make_lively_model()
        with torch.no_grad():
            logits = model(pixel_values).logits
        assert 0.1 < (logits > 0).float().mean() < 0.9, f"{name} finds an object nearly everywhere or nowhere"
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        picture.save(folder / name / "picture.png")
        save_file({"pixel_values": pixel_values, "logits": logits}, folder / name / "expected.safetensors")
    return [folder / name for name in TESTERS]


if __name__ == "__main__":
    save_tiny_models(Path(sys.argv[1]))
