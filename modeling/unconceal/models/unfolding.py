"""Return and draw the maps of every stage of RUN."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel

from .backbones import COARSEST_STRIDE
from .image_processing_unconceal import UnconcealImageProcessor
from .modeling_unconceal import padding_to
from .painting import remove_object


GRAY = np.array([[0, 0, 0], [255, 255, 255]])
# Black, violet, orange, pale yellow. Lightness rises all the way, so the scale reads in gray and without color vision.
HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])


def draw_scale(values: np.ndarray, scale: np.ndarray, top: float = 1) -> Image.Image:
    """Color values (H, W) by a scale, as RGB.

    Args:
        values: From 0. Values above `top` get the last color.
        scale: (n, 3), colors at equal distances, 0 to 255.
        top: Value of the last color.
    """
    positions = np.linspace(0, top, len(scale))
    colors = np.stack([np.interp(values, positions, channel) for channel in scale.T], axis=-1)
    return Image.fromarray(np.rint(colors).astype(np.uint8))


def draw_colors(values: np.ndarray) -> Image.Image:
    """Return colors (H, W, 3) in [0, 1] as an RGB image."""
    return Image.fromarray(np.rint(values.clip(0, 1) * 255).astype(np.uint8))


@dataclass(frozen=True)
class Stage:
    """Maps of one stage k, float32; k = 0 has no edge.

    Attributes:
        stride: Input pixels per position of `mask`, along a side.
        map_size: (width, height) of the mask before it was enlarged, with padding.
        mask: M_k, (H, W), in [0, 1].
        edge: E_k, (H, W), in [0, 1].
        opinion: 1 - s_k, the mask as the background sees it, like `mask`. Older networks lack it.
        background: The image with the object of M_k painted over, (H, W, 3), RGB, [0, 1] is black to white.
        reconstruction: C^_k, like `background`. Some networks lack it for k = 0.
        error: |C^_k - C|, mean over the channels, (H, W). C is the input at the resolution of the stage.
    """

    stride: int
    map_size: tuple[int, int]
    mask: np.ndarray
    edge: np.ndarray | None
    opinion: np.ndarray | None
    background: np.ndarray
    reconstruction: np.ndarray | None
    error: np.ndarray | None

    @property
    def uncertainty(self) -> np.ndarray:
        """Return 1 - |2 M_k - 1|, 1 at probability 0.5."""
        return 1 - np.abs(2 * self.mask - 1)

    def images(self) -> dict[str, Image.Image]:
        """Draw mask, edge (from k = 1), background and uncertainty."""
        edge = {} if self.edge is None else {"edge": draw_scale(self.edge, GRAY)}
        return {
            "mask": draw_scale(self.mask, GRAY),
            **edge,
            "background": draw_colors(self.background),
            "uncertainty": draw_scale(self.uncertainty, HEAT),
        }


@dataclass(frozen=True)
class Unfolding:
    """Final mask of one image, and its stages.

    Attributes:
        mask: (H, W), float32 in [0, 1].
        input_size: (width, height) at which the network sees the image.
        stages: From the coarse start, k = 0, to the last stage.
    """

    mask: np.ndarray
    input_size: tuple[int, int]
    stages: tuple[Stage, ...]


@torch.no_grad()
def unfold(
    model: PreTrainedModel, processor: UnconcealImageProcessor, image: Image.Image, size: tuple[int, int] | None = None
) -> Unfolding:
    """Return the maps of every stage for one image.

    Maps are enlarged by repeating positions, which shows their true resolution. They shrink by averaging.

    Args:
        model: A network that unfolds.
        processor: Its image processor.
        image: RGB image, upright.
        size: (width, height) of the maps, by default the size of the image. Large maps take much memory.

    Raises:
        ValueError: If the network has no stages.
    """
    if not model.num_stages:
        raise ValueError(
            f"got {type(model).__name__}, which has no stages; expected a network that unfolds, such as RUN"
        )
    width, height = size or image.size
    pixel_values = processor(image).pixel_values.to(model.device, model.dtype)
    outputs = model(pixel_values=pixel_values, output_stages=True)
    (mask,) = processor.post_process_masks(outputs, [(height, width)])
    input_height, input_width = pixel_values.shape[-2:]
    full_image = model.denormalize(pixel_values)  # C
    full_image = F.pad(full_image, padding_to(COARSEST_STRIDE, input_height, input_width), mode="replicate")

    def stride_of(maps: torch.Tensor) -> int:
        return full_image.shape[-1] // maps.shape[-1]

    def resized(maps: torch.Tensor | None) -> np.ndarray | None:
        if maps is None:
            return None
        # Only the part that covers the image; its edge may lie inside a position.
        box = (0, 0, input_width / stride_of(maps), input_height / stride_of(maps))
        channels = [
            np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BOX, box))
            for channel in maps[0].float().cpu().numpy()
        ]
        if len(channels) == 1:
            return channels[0]
        # The network sees colors in the processor's order.
        return np.stack(channels if processor.channel_order == "rgb" else channels[::-1], axis=-1)

    edges = (None, *(logits.float().sigmoid() for logits in outputs.edge_logits))  # they begin at stage 1
    errors = [
        None if maps is None else (maps - F.avg_pool2d(full_image, stride_of(maps))).abs().mean(1, keepdim=True)
        for maps in outputs.reconstructions
    ]
    opinions = [(-logits.float()).sigmoid() for logits in outputs.share_logits or ()] or [None] * len(errors)
    shown = image.resize((width, height), Image.Resampling.BOX)
    stages = []
    for logits, *others in zip(outputs.mask_logits, edges, opinions, outputs.reconstructions, errors, strict=True):
        probs, (edge, opinion, *rebuilt) = resized(logits.float().sigmoid()), map(resized, others)
        background = remove_object(shown, probs)
        stages.append(Stage(stride_of(logits), tuple(logits.shape[:1:-1]), probs, edge, opinion, background, *rebuilt))
    return Unfolding(mask.cpu().numpy(), (input_width, input_height), tuple(stages))
