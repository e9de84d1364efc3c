"""Draw how a network finds its mask, stage by stage."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..segmenting import mark_of_png
from ..utils.errors import UserError
from ..utils.files import is_taken, replacing
from .segment import add_model_arguments, load_model


if TYPE_CHECKING:
    from PIL import Image

SOFTWARE = "unconceal sheet"  # in every sheet, so that --overwrite replaces no other file


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal explain`."""
    parser.usage = "unconceal explain IMAGE --model ID --out FILE.png [options]"
    parser.description = (
        "Draw a sheet with a row for each stage: mask, its outline on the image, edge, the mask as the background "
        "sees it, the image without the object, uncertainty, reconstruction and its error. For networks with stages, "
        "such as RUN."
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="one image")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the sheet")
    add_model_arguments(parser)


def run(args: argparse.Namespace):
    """Draw the sheet of one image."""
    out = args.out
    if out.suffix.lower() != ".png":
        raise UserError(f"got --out {out}, expected a file name that ends in .png")
    if os.path.realpath(out) == os.path.realpath(args.image):
        raise UserError(f"got {out} as input and as --out; choose another name for the sheet")
    if is_taken(out) and not args.overwrite:
        raise UserError(f"{out} exists; replace it with --overwrite")
    if is_taken(out) and not is_sheet(out):
        raise UserError(f"{out} is no sheet of this command, so it is not replaced; choose another --out")
    from ..api import opened
    from ..hub.exported import refuse_exported

    refuse_exported(args.model, "unconceal explain")
    image = opened(args.image, args.max_pixels)
    sheet = load_model(args).explain(image)
    try:
        save_sheet(sheet, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    print(f"wrote {out}")


def save_sheet(sheet: "Image.Image", out: Path):
    """Write a drawn image as a PNG file that `is_sheet` knows."""
    from PIL.PngImagePlugin import PngInfo

    marks = PngInfo()
    marks.add_text("Software", SOFTWARE)
    with replacing(out) as temporary:
        sheet.save(temporary, pnginfo=marks)


def is_sheet(path: Path) -> bool:
    """Return whether `save_sheet` wrote a file."""
    return mark_of_png(path, SOFTWARE) is not None
