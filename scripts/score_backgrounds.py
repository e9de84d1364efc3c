"""Score images with their object painted over, where the truth is known.

    python scripts/score_backgrounds.py --data data/hidden --split val
    python scripts/score_backgrounds.py --data data/hidden --split val --model camouflage --sheet backgrounds.png

The data set needs the column `background`, as `unconceal prepare camouflage` writes it. Without a model the true mask
is painted over. Scores are over the pixels of the true mask: what a model paints over beyond it does not count, nor do
images without an object.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.metrics import structural_similarity

import unconceal
from unconceal.data.loading import load_splits, read_pair
from unconceal.models.painting import paint_over
from unconceal.models.reading import to_rgb


SHEET_ROWS = 10


def to_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def scores(image: torch.Tensor, truth: torch.Tensor, inside: np.ndarray) -> tuple[float, float]:
    """Return PSNR in dB and SSIM inside the mask."""
    error = (image - truth).square().mean(0)[torch.from_numpy(inside)].mean().item()
    images = (one.permute(1, 2, 0).numpy() for one in (image, truth))
    _, similarity = structural_similarity(*images, channel_axis=2, data_range=1, full=True)
    return -10 * np.log10(max(error, 1e-10)), similarity.mean(2)[inside].mean()


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set with the column background")
    parser.add_argument("--split", default="val")
    parser.add_argument("--model", help="network whose mask is painted over; by default the true mask")
    parser.add_argument("--sheet", type=Path, help="also draw image, truth, smooth and painted background")
    args = parser.parse_args()
    rows = load_splits(args.data, [args.split])[args.split]
    if "background" not in rows.features:
        return f"data set {args.data} has no column background; make it by unconceal prepare camouflage"
    segmenter = args.model and unconceal.load(args.model)
    found, drawn = {}, []
    for number in range(len(rows)):
        row, photo, true_mask = read_pair(rows, number)
        image, truth = to_pixels(photo), to_pixels(to_rgb(row["background"]))
        inside = np.asarray(true_mask) > 127
        if not inside.any():
            continue
        mask = segmenter.segment(photo) if segmenter else inside.astype(np.float32)
        kinds = {"object left in": image}
        for kind, patches in (("smooth", 0), ("with texture", None)):
            painted, weight = paint_over(image, torch.tensor(mask), *([] if patches is None else [patches]))
            kinds[kind] = torch.lerp(image, painted, weight)
        for kind, one in kinds.items():
            found.setdefault(kind, []).append(scores(one, truth, inside))
        if len(drawn) < SHEET_ROWS:
            drawn.append(torch.cat([image, truth, *list(kinds.values())[1:]], dim=2))
    if not found:
        return f"no image of {args.data} has an object"
    for kind, values in found.items():
        psnr, ssim = np.mean(values, axis=0)
        print(f"{kind}: PSNR {psnr:.2f} dB, SSIM {ssim:.3f}, {len(values)} images")
    if args.sheet:
        width = max(one.shape[2] for one in drawn)
        sheet = torch.cat([torch.nn.functional.pad(one, (0, width - one.shape[2])) for one in drawn], dim=1)
        Image.fromarray(np.rint(sheet.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(args.sheet)
    return None


if __name__ == "__main__":
    sys.exit(main())
