"""What the page and its clients can ask for: pictures in, masks, cut-outs, boxes and stages out."""

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
from networks import Networks, task_of
from pictures import Refused, hold, preview_size, read_header, read_picture, upload_folder
from PIL import Image
from scipy import ndimage


try:
    import spaces  # a ZeroGPU Space lends its GPU to functions that this decorates
except ImportError:
    spaces = None

MAX_FILES = 50  # of a batch
MAX_BATCH_PIXELS = 500_000_000
PREVIEW_SIDE = 1280  # pixels, of what the page draws; downloads have the picture's own size
STAGE_SIDE = 360
THRESHOLD = 0.5
MAX_BOXES = 50
OUTPUTS = ("mask", "cutout")
STAGE_MAPS = ("mask", "edge", "background", "uncertainty")
REPORT_COLUMNS = ["file", "result", "width", "height", "seconds", "share"]
DRAWN_BY_BROWSERS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "WEBP")
RUN_STRIDE = 32  # RUN pads pictures to multiples of this
# Lightness rises all the way, so that it reads without colour vision.
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
NO_PROGRESS = gr.Progress()


def gpu(function):
    """On a ZeroGPU Space, run a function where there is a GPU; elsewhere leave it as it is."""
    return spaces.GPU(duration=120)(function) if spaces else function


# ZeroGPU sends the arguments of these to a process that it forks for a while: names and pictures alone can go that way.
# The networks are found there by `offered`, loaded before the fork.
offered: dict[str, Networks] = {}


@gpu
def look(name: str, picture: Image.Image, refine: str) -> tuple[np.ndarray, Image.Image]:
    """Return the soft mask (H, W) of a picture as it is displayed, float32 in [0, 1], and the same as 8-bit grey."""
    found = offered["here"][name](picture, refine=refine)
    return found["probs"].numpy(), found["mask"]


@gpu
def look_in_stages(name: str, picture: Image.Image) -> list[dict[str, Image.Image]]:
    """Return the maps of each stage of an unfolding, by their names in `STAGE_MAPS`, in the picture's shape.

    Positions are enlarged as squares, to show at what resolution the network works.
    """
    find = offered["here"][name]
    processor = find.image_processor
    pixel_values = processor(picture).pixel_values.to(find.device, find.model.dtype)
    with torch.inference_mode():
        outputs = find.model(pixel_values, output_stages=True)
    height, width = pixel_values.shape[-2:]
    padded_width = math.ceil(width / RUN_STRIDE) * RUN_STRIDE
    size = preview_size(picture.size, STAGE_SIDE)

    def shown(maps: torch.Tensor) -> Image.Image:
        stride = padded_width / maps.shape[-1]
        channels = np.rint(maps[0].float().clamp(0, 1).cpu().numpy() * 255).astype(np.uint8)
        drawn = [
            Image.fromarray(channel).resize(size, Image.Resampling.NEAREST, (0, 0, width / stride, height / stride))
            for channel in channels
        ]
        if len(drawn) == 1:
            return drawn[0]
        return Image.merge("RGB", drawn if processor.channel_order == "rgb" else drawn[::-1])

    stages = []
    for k, logits in enumerate(outputs.mask_logits):
        mask = logits.float().sigmoid()
        stage = {"mask": shown(mask), "uncertainty": heated(shown(1 - (2 * mask - 1).abs()))}
        if k > 0:  # edges begin with the first stage
            stage["edge"] = shown(outputs.edge_logits[k - 1].float().sigmoid())
        if outputs.backgrounds:
            stage["background"] = shown(outputs.backgrounds[k])
        stages.append(stage)
    return stages


def heated(grey: Image.Image) -> Image.Image:
    """Colour a grey picture from black over violet and orange to pale yellow, ever lighter."""
    positions = np.linspace(0, 255, len(HEAT))
    table = np.stack([np.interp(np.arange(256), positions, channel) for channel in np.transpose(HEAT)], axis=-1)
    return Image.fromarray(np.rint(table).astype(np.uint8)[np.asarray(grey)])


def find_boxes(mask: np.ndarray) -> list[dict[str, int]]:
    """Return what lies above the threshold as connected parts, corners touching included, the largest first.

    Returns:
        Up to `MAX_BOXES` of `x`, `y` (left, top), `width`, `height` and `area`, in pixels.
    """
    parts, count = ndimage.label(mask > THRESHOLD, np.ones((3, 3)))
    areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    places = ndimage.find_objects(parts)
    boxes = []
    for index in np.argsort(-areas, kind="stable")[:MAX_BOXES]:
        rows, columns = places[index]
        boxes.append(
            {
                "x": int(columns.start),
                "y": int(rows.start),
                "width": int(columns.stop - columns.start),
                "height": int(rows.stop - rows.start),
                "area": int(areas[index]),
            }
        )
    return boxes


def result_folder() -> Path:
    """Make a folder of which nobody knows the name, where a result can be downloaded for a while."""
    folder = upload_folder() / secrets.token_hex(16)
    folder.mkdir(parents=True)
    return folder


def save(picture: Image.Image, source: str, suffix: str = "") -> str:
    """Write a result as PNG, named after the picture it belongs to."""
    path = result_folder() / f"{Path(source).stem}{suffix}.png"
    picture.save(path, compress_level=3)  # of the largest pictures, twice as fast as the default and hardly larger
    return str(path)


def as_text(picture: Image.Image, kind: str) -> str:
    """Return a picture as an address that holds all of it."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{b64encode(buffer.getvalue()).decode()}"


class Demo:
    """What the page and its clients can ask for. A method is one request and keeps nothing of it."""

    def __init__(self, networks: Networks):
        self.networks = offered["here"] = networks

    def open(self, path: str | None, name: str) -> Image.Image:
        """Return an uploaded picture as it is displayed, in RGB."""
        if not path:
            raise Refused("There is no picture yet.")
        hold([path])
        processor = self.networks[name].image_processor
        hold([path])  # loading may have taken long
        picture = read_picture(path)
        try:
            return processor.to_rgb(picture)
        # Values that are no colours, a damaged profile, ...: Pillow raises nearly any class.
        except Exception:
            raise Refused("This picture is damaged: its colours or its orientation cannot be read.") from None

    def look(self, name: str, picture: Image.Image, fine_edges: bool) -> tuple[np.ndarray, Image.Image, float]:
        """Return a picture's soft mask, the same as 8-bit grey, and the seconds that took."""
        started = time.perf_counter()
        try:
            probs, mask = look(name, picture, "auto" if fine_edges else "never")
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
                raise
            raise Refused("There is not enough memory for this picture. Make it smaller and try again.") from None
        return probs, mask, time.perf_counter() - started

    def report(self, name: str, probs: np.ndarray, seconds: float) -> dict:
        """Return what is known of a result, beside the mask."""
        return {
            "network": name,
            "model": self.networks.describe(name),
            "device": str(self.networks.device),
            "width": probs.shape[1],
            "height": probs.shape[0],
            "seconds": round(seconds, 3),
            "share": float((probs > THRESHOLD).mean()),
            "boxes": find_boxes(probs),
        }

    # For programs.

    def segment(self, image: str, network: str, fine_edges: bool = True) -> tuple[str, dict]:
        """Find the object. Returns its soft mask, an 8-bit grey PNG of the picture's displayed size, white where the
        object is, and a report: width, height, seconds, device, network, the object's share of the picture, and boxes
        (x, y, width, height, area in pixels) of its parts above a probability of 0.5, the largest first.
        """
        probs, mask, seconds = self.look(network, self.open(image, network), fine_edges)
        return save(mask, image, "_mask"), self.report(network, probs, seconds)

    def cutout(self, image: str, network: str, fine_edges: bool = True) -> str:
        """Cut the object out. Returns a PNG of the picture's displayed size with the soft mask as its opacity."""
        picture = self.open(image, network)
        _, mask, _ = self.look(network, picture, fine_edges)
        return save(self.networks[network].cut_out(picture, mask), image, "_cutout")

    def unfold(self, image: str, network: str) -> list[tuple[str, str]]:
        """Show how RUN comes to its mask: for each stage k, from the coarse start k = 0, pictures of mask, edge (from
        k = 1 on), background and uncertainty, captioned such as "2 edge".
        """
        stages = self.stages(network, self.open(image, network))
        return [
            (save(stage[kind], image, f"_{k}_{kind}"), f"{k} {kind}")
            for k, stage in enumerate(stages)
            for kind in STAGE_MAPS
            if kind in stage
        ]

    def stages(self, name: str, picture: Image.Image) -> list[dict[str, Image.Image]]:
        """Return the maps of each stage of the unfolding."""
        if not self.networks.unfolds(name):
            raise Refused("This network comes to its mask in one step; RUN unfolds in stages.")
        return look_in_stages(name, picture)

    def segment_batch(
        self,
        images: list[str],
        network: str,
        outputs: list[str],
        fine_edges: bool = True,
        progress: gr.Progress = NO_PROGRESS,
    ) -> tuple[str, list[list]]:
        """Find the object in many pictures. Returns a ZIP of what `outputs` names, "mask", "cutout" or both, with a
        report.csv, and that report as a table: file, what became of it, width, height, seconds, share of the object. A
        picture that cannot be read is listed there and stops no other.
        """
        if not images:
            raise Refused("There are no pictures yet.")
        if len(images) > MAX_FILES:
            raise Refused(f"Got {len(images)} pictures; send up to {MAX_FILES} at a time.")
        if not outputs or set(outputs) - set(OUTPUTS):
            raise Refused(f"Expected the outputs {' and '.join(OUTPUTS)}, one or both.")
        if sum(read_header(image)[1] for image in images) > MAX_BATCH_PIXELS:
            limit = MAX_BATCH_PIXELS / 1e6
            raise Refused(f"These pictures have more than {limit:g} megapixels together; send them in parts.")
        folder = result_folder()
        path = folder / "unconceal.zip"
        rows, taken = [], set()
        try:
            # Stored, not deflated: PNG files do not shrink any further.
            with zipfile.ZipFile(path, "w") as archive:
                for index, image in enumerate(images):
                    progress((index, len(images)), desc=Path(image).name, unit="pictures")
                    hold(images[index:])
                    rows.append(self._add(archive, image, network, outputs, fine_edges, taken))
                progress((len(images), len(images)), unit="pictures")
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
        """Add the results of one picture to an archive and return its row of the report."""
        name = Path(image).name
        if name.startswith(("=", "+", "-", "@")):
            name = f"'{name}"  # which a spreadsheet would else reckon
        try:
            picture = self.open(image, network)
            probs, mask, seconds = self.look(network, picture, fine_edges)
        except Refused as error:
            return [name, error.message, None, None, None, None]
        stem, number = Path(image).stem, 2
        while stem in taken:  # of files of one name
            stem, number = f"{Path(image).stem}-{number}", number + 1
        taken.add(stem)
        for output in dict.fromkeys(outputs):
            result = mask if output == "mask" else self.networks[network].cut_out(picture, mask)
            with archive.open(f"{stem}_{output}.png", "w", force_zip64=True) as file:
                result.save(file, "PNG", compress_level=3)
        return [name, "done", *picture.size, round(seconds, 3), round(float((probs > THRESHOLD).mean()), 4)]

    # For the page.

    def show(self, image: str | None, network: str, fine_edges: bool) -> tuple[dict, str | None]:
        """Return what the viewer draws, or the reason why there is nothing, and the mask to download."""
        try:
            picture = self.open(image, network)
            probs, mask, seconds = self.look(network, picture, fine_edges)
        except gr.Error as error:
            return {"error": error.message}, None
        size = preview_size(picture.size, PREVIEW_SIDE)
        value = {
            **self.report(network, probs, seconds),
            "picture": as_text(picture.resize(size, Image.Resampling.BOX), "JPEG"),
            "mask": as_text(mask.resize(size, Image.Resampling.BOX), "PNG"),
            "view": task_of(network).view,
            "unfolds": self.networks.unfolds(network),
        }
        return value, save(mask, image, "_mask")

    def show_stages(self, image: str | None, network: str) -> list[dict[str, str]] | dict[str, str]:
        """Return the maps of each stage as the viewer draws them, or the reason why there are none."""
        try:
            stages = self.stages(network, self.open(image, network))
        except gr.Error as error:
            return {"error": error.message}
        return [{kind: as_text(picture, "PNG") for kind, picture in stage.items()} for stage in stages]

    def show_cutout(self, image: str | None, mask: str | None, network: str) -> str:
        """Return the cut-out to download, by the mask that is on the page."""
        picture = self.open(image, network)
        if not mask:
            raise Refused("There is no mask yet.")
        try:
            cut = self.networks[network].cut_out(picture, read_picture(mask))
        except ValueError:
            raise Refused("This mask is of another picture.") from None
        return save(cut, image, "_cutout")

    def show_all(self, image: str | None, network: str, fine_edges: bool) -> tuple:
        """Do what `show` does, and put a picture in place of one that browsers cannot draw, such as TIFF.

        Returns:
            What becomes of viewer, mask download, cut-out button, picture, and the picture that these belong to.
        """
        if not image:
            return (gr.skip(),) * 5
        value, mask = self.show(image, network, fine_edges)
        found = mask is not None
        if not found:
            drawn = None
        elif read_header(image)[0] in DRAWN_BY_BROWSERS:
            drawn = gr.skip()
        else:
            drawn = save(self.open(image, network), image)
        return (
            value,
            gr.update(value=mask, interactive=found),
            gr.update(interactive=found),
            drawn,
            image if found else None,
        )
