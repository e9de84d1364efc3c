"""Answer requests: images in; masks, cut-outs, boxes and stages out."""

import csv
import io
import math
import secrets
import shutil
import time
import zipfile
from base64 import b64encode
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from catalog import Catalog, use_of
from PIL import Image
from scipy import ndimage
from uploads import Refused, keep_longer, read_header, read_image, upload_folder


try:
    import spaces

    gpu = spaces.GPU(duration=120)  # lends a GPU to decorated functions on a ZeroGPU Space
except ImportError:

    def gpu(function):
        return function


MAX_FILES = 50  # of a batch
MAX_BATCH_PIXELS = 500_000_000
PREVIEW_SIDE = 1280  # pixels of what the page draws; downloads have the full size
STAGE_SIDE = 360
THRESHOLD = 0.5
MAX_BOXES = 50
OUTPUTS = ("mask", "cutout")
REPORT_COLUMNS = ["file", "result", "width", "height", "seconds", "share"]
DRAWN_BY_BROWSERS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "WEBP")
NO_PROGRESS = gr.Progress()


# ZeroGPU pickles the arguments of `gpu` functions for a forked process, so they take only names and images.
# The fork finds the catalog here, with its networks loaded.
shared: dict[str, Catalog] = {}


@gpu
def predict_mask(name: str, image: Image.Image, refine: str) -> tuple[np.ndarray, Image.Image]:
    """Return the soft mask, (H, W) in [0, 1], and its image."""
    found = shared["catalog"][name](image, refine=refine)
    return found["probs"].numpy(), found["mask"]


@gpu
def predict_stages(name: str, image: Image.Image) -> list[dict[str, Image.Image]]:
    """Return the maps of each stage by name, shaped like the image."""
    unfolding = shared["catalog"][name].unfold(image, preview_size(image.size, STAGE_SIDE))
    # Gray files of mask and edge are a third as large.
    return [
        {kind: drawn.convert("L") if kind in ("mask", "edge") else drawn for kind, drawn in stage.images().items()}
        for stage in unfolding.stages
    ]


def preview_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return (width, height), shrunk to at most `side`."""
    scale = min(1, side / max(size))
    return tuple(max(1, math.floor(length * scale + 0.5)) for length in size)


def find_boxes(mask: np.ndarray) -> list[dict[str, int]]:
    """Return a box around each part above the threshold, largest first.

    Pixels that touch at corners belong to one part.
    """
    parts, count = ndimage.label(mask > THRESHOLD, np.ones((3, 3)))
    areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    places = ndimage.find_objects(parts)
    boxes = []
    for index in np.argsort(-areas, kind="stable")[:MAX_BOXES]:
        y, x = places[index]
        size = {"width": x.stop - x.start, "height": y.stop - y.start}
        boxes.append({"x": x.start, "y": y.start, **size, "area": int(areas[index])})
    return boxes


def result_folder() -> Path:
    """Create a folder with an unguessable name."""
    folder = upload_folder() / secrets.token_hex(16)
    folder.mkdir(parents=True)
    return folder


def save(image: Image.Image, source: str, suffix: str = "") -> str:
    """Write a result as PNG, named after its source image."""
    path = result_folder() / f"{Path(source).stem}{suffix}.png"
    image.save(path, compress_level=3)  # twice as fast as the default, and hardly larger
    return str(path)


def to_data_url(image: Image.Image, kind: str) -> str:
    """Return an image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{b64encode(buffer.getvalue()).decode()}"


class Demo:
    """Requests of the page and of programs, which keep nothing."""

    def __init__(self, catalog: Catalog):
        self.catalog = shared["catalog"] = catalog

    def open(self, path: str | None, name: str) -> Image.Image:
        """Return an uploaded image upright in RGB."""
        if not path:
            raise Refused("Add an image first.")
        keep_longer([path])
        processor = self.catalog[name].image_processor
        keep_longer([path])  # loading may have taken long
        image = read_image(path)
        try:
            return processor.to_rgb(image)
        # Impossible color values, a damaged profile, ...: Pillow raises nearly any class.
        except Exception as error:
            raise Refused("This image is damaged: its colors or orientation cannot be read.") from error

    def predict(self, name: str, image: Image.Image, fine_edges: bool) -> tuple[np.ndarray, Image.Image, float]:
        """Return the soft mask, the same as 8-bit gray, and the seconds."""
        started = time.perf_counter()
        try:
            probs, mask = predict_mask(name, image, "auto" if fine_edges else "never")
        except ValueError as error:
            if type(error).__name__ != "NonFiniteLogits":  # a class of the network's own code
                raise
            raise Refused("The network computes no numbers for this image. Its weights are damaged.") from error
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
                raise
            raise Refused("Not enough memory for this image. Make it smaller and try again.") from error
        return probs, mask, time.perf_counter() - started

    def report(self, name: str, probs: np.ndarray, seconds: float) -> dict:
        return {
            "network": name,
            "model": self.catalog.describe(name),
            "device": str(self.catalog.device),
            "width": probs.shape[1],
            "height": probs.shape[0],
            "seconds": round(seconds, 3),
            "share": float((probs > THRESHOLD).mean()),
            "boxes": find_boxes(probs),
        }

    # For programs. gradio shows these docstrings as the documentation of the API.

    def segment(self, image: str, network: str, fine_edges: bool = True) -> tuple[str, dict]:
        """Find the object and return its soft mask and a report.

        The mask is an 8-bit gray PNG of the size of the upright image, white where the object is. The report has
        `width`, `height`, `seconds`, `device`, `network` and `model`. `share` is the part of the image that the object
        covers. `boxes` lists the parts with a probability above 0.5, largest first. Each has `x`, `y`, `width`,
        `height` and `area` in pixels.
        """
        probs, mask, seconds = self.predict(network, self.open(image, network), fine_edges)
        return save(mask, image, "_mask"), self.report(network, probs, seconds)

    def cutout(self, image: str, network: str, fine_edges: bool = True) -> str:
        """Cut the object out.

        The result is a PNG of the size of the upright image. Its opacity is the soft mask.
        """
        opened = self.open(image, network)
        _, mask, _ = self.predict(network, opened, fine_edges)
        return save(self.catalog[network].cut_out(opened, mask), image, "_cutout")

    def unfold(self, image: str, network: str) -> list[tuple[str, str]]:
        """Show how RUN finds its mask, stage by stage.

        Each stage k, starting at the coarse k = 0, has images of mask, edge (from k = 1), background (the
        image without the object) and uncertainty.
        Their captions are stage and kind, such as "2 edge".
        """
        return [
            (save(drawn, image, f"_{k}_{kind}"), f"{k} {kind}")
            for k, stage in enumerate(self.stages(network, self.open(image, network)))
            for kind, drawn in stage.items()
        ]

    def stages(self, name: str, image: Image.Image) -> list[dict[str, Image.Image]]:
        if not self.catalog.unfolds(name):
            advice = "If this is RUN, save it again with the current version of Unconceal."
            raise Refused(f"Only RUN shows stages. {advice}")
        return predict_stages(name, image)

    def segment_batch(
        self,
        images: list[str],
        network: str,
        outputs: list[str],
        fine_edges: bool = True,
        progress: gr.Progress = NO_PROGRESS,
    ) -> tuple[str, list[list]]:
        """Find the object in many images. Return ZIP and report.

        `outputs` is a list of "mask", "cutout" or both. The report is also in the ZIP, as report.csv. Its columns are
        file, result, width, height, seconds and share of the object. Unreadable images are listed and skipped.
        """
        if not images:
            raise Refused("Add images first.")
        if len(images) > MAX_FILES:
            raise Refused(f"Got {len(images)} images. Send at most {MAX_FILES} at a time.")
        if not outputs or set(outputs) - set(OUTPUTS):
            raise Refused(f"Choose the outputs: {' or '.join(OUTPUTS)}, or both.")
        if sum(read_header(image)[1] for image in images) > MAX_BATCH_PIXELS:
            limit = MAX_BATCH_PIXELS / 1e6
            raise Refused(f"These images have more than {limit:g} megapixels together. Send fewer at a time.")
        folder = result_folder()
        path = folder / "unconceal.zip"
        rows, taken = [], set()
        try:
            # Not compressed: PNG files do not shrink further.
            with zipfile.ZipFile(path, "w") as archive:
                for index, image in enumerate(images):
                    progress((index, len(images)), desc=Path(image).name, unit="images")
                    keep_longer(images[index:])
                    rows.append(self._add(archive, image, network, outputs, fine_edges, taken))
                progress((len(images), len(images)), unit="images")
                text = io.StringIO()
                csv.writer(text).writerows([REPORT_COLUMNS, *rows])
                archive.writestr("report.csv", text.getvalue())
        except BaseException:
            shutil.rmtree(folder)
            raise
        return str(path), rows

    def _add(
        self, archive: zipfile.ZipFile, image: str, network: str, outputs: list[str], fine_edges: bool, taken: set[str]
    ) -> list:
        name = Path(image).name
        if name.startswith(("=", "+", "-", "@")):
            name = f"'{name}"  # otherwise a spreadsheet would run it as a formula
        try:
            opened = self.open(image, network)
            probs, mask, seconds = self.predict(network, opened, fine_edges)
        except Refused as error:
            return [name, error.message, None, None, None, None]
        stem, number = Path(image).stem, 2
        while stem in taken:  # several files of one name
            stem, number = f"{Path(image).stem}-{number}", number + 1
        taken.add(stem)
        for output in dict.fromkeys(outputs):
            result = mask if output == "mask" else self.catalog[network].cut_out(opened, mask)
            with archive.open(f"{stem}_{output}.png", "w", force_zip64=True) as file:
                result.save(file, "PNG", compress_level=3)
        return [name, "done", *opened.size, round(seconds, 3), round(float((probs > THRESHOLD).mean()), 4)]

    # For the page.

    def show(self, image: str | None, network: str, fine_edges: bool) -> tuple:
        """Find the object and return what the page shows.

        An image that browsers cannot draw, such as TIFF, is replaced by a PNG.

        Returns:
            Values of the viewer, mask download, cut-out button, image, and the image that the result belongs to.
        """
        if not image:
            return (gr.skip(),) * 5
        try:
            opened = self.open(image, network)
            probs, mask, seconds = self.predict(network, opened, fine_edges)
        except gr.Error as error:
            off = gr.update(interactive=False)
            return {"error": error.message}, gr.update(value=None, interactive=False), off, None, None
        size = preview_size(opened.size, PREVIEW_SIDE)
        value = {
            **self.report(network, probs, seconds),
            "image": to_data_url(opened.resize(size, Image.Resampling.BOX), "JPEG"),
            "mask": to_data_url(mask.resize(size, Image.Resampling.BOX), "PNG"),
            "view": use_of(network).view,
            "unfolds": self.catalog.unfolds(network),
        }
        drawn = gr.skip() if read_header(image)[0] in DRAWN_BY_BROWSERS else save(opened, image)
        download = gr.update(value=save(mask, image, "_mask"), interactive=True)
        return value, download, gr.update(interactive=True), drawn, image

    def show_stages(self, image: str | None, network: str) -> list[dict[str, str]] | dict[str, str]:
        """Return the maps of each stage as data URLs, or an error."""
        try:
            stages = self.stages(network, self.open(image, network))
        except gr.Error as error:
            return {"error": error.message}
        return [{kind: to_data_url(drawn, "PNG") for kind, drawn in stage.items()} for stage in stages]

    def show_cutout(self, image: str | None, mask: str | None, network: str) -> str:
        """Return the cut-out to download, using the mask on the page."""
        opened = self.open(image, network)
        if not mask:
            raise Refused("Find the object first.")
        try:
            cut = self.catalog[network].cut_out(opened, read_image(mask))
        except ValueError as error:
            raise Refused("This mask belongs to another image.") from error
        return save(cut, image, "_cutout")
