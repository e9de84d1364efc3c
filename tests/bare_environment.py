"""Open saved networks in every way, with transformers but without this package.

    python -I tests/bare_environment.py FOLDER_OR_HUB_ID ...

Besides the network and its processor, each folder holds `image.png` and `expected.safetensors`: its `pixel_values`,
`logits`, and the mask of `enlarged(image)`, `refined`. tests/save_tiny_models.py writes such folders. Each way prints
a line. The first failure ends the program with exit code 1.
"""

# ruff: noqa: T201
import argparse
import importlib.util
import logging
import sys
import traceback
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
    Pipeline,
    pipeline,
)
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import cached_file


ABSENT = ("unconceal", "accelerate", "datasets", "evaluate", "pytest", "scipy", "torchvision")
# transformers 5.17 exports AutoImageProcessor at the top level only with torchvision.
PROCESSORS = (AutoImageProcessor, AutoProcessor)
MODELS = (AutoModel, AutoModelForImageSegmentation, AutoModelForSemanticSegmentation)
HARD, SOFT = "image-segmentation", "soft-image-segmentation"


def enlarged(image: Image.Image) -> Image.Image:
    """Return an image so large that its edges are refined."""
    return image.resize((4 * image.width, 4 * image.height))


@contextmanager
def way(name: str):
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"FAILED: {name}: {type(error).__name__}: {error}")
    print(f"ok: {name}", flush=True)


@contextmanager
def no_error_logged():
    """Fail if transformers logs an error and continues."""
    records = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not records, f"logged: {[record.getMessage() for record in records]}"


def open_with(auto_class: type, name: str, **options):
    opened = auto_class.from_pretrained(name, trust_remote_code=True, **options)
    # An installed package would be used instead of the files.
    assert type(opened).__module__.startswith("transformers_modules."), type(opened)
    return opened


def check_auto_classes(name: str, image: Image.Image, expected: dict[str, torch.Tensor]):
    with way(f"{name}: AutoConfig"):
        config = open_with(AutoConfig, name)
        assert set(config.id2label) == {0, 1}, config.id2label
    for auto_class in PROCESSORS:
        with way(f"{name}: {auto_class.__name__}, equal pixel_values"):
            pixel_values = open_with(auto_class, name)(images=image, return_tensors="pt").pixel_values
            check_equal(pixel_values, expected["pixel_values"])
    for auto_class in MODELS:
        with way(f"{name}: {auto_class.__name__}, equal logits"), torch.no_grad():
            model = open_with(auto_class, name)
            assert type(model).__name__ == config.architectures[0], type(model)
            assert not model.training
            check_equal(model(pixel_values).logits, expected["logits"])
    with way(f"{name}: saved again"), torch.no_grad(), TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.testing.assert_close(open_with(MODELS[0], folder)(pixel_values).logits, expected["logits"])
    for dtype in (torch.bfloat16, torch.float16):
        with way(f"{name}: AutoModelForImageSegmentation, {dtype}"), torch.no_grad():
            model = open_with(AutoModelForImageSegmentation, name, dtype=dtype)
            logits = model(pixel_values.to(dtype)).logits
            assert (model.dtype, logits.dtype) == (dtype, dtype), (model.dtype, logits.dtype)
            check_near(logits, expected["logits"])


def check_equal(tensor: torch.Tensor, exact: torch.Tensor):
    torch.testing.assert_close(tensor, exact, rtol=0, atol=0)


def check_near(logits: torch.Tensor, exact: torch.Tensor):
    """Check logits in half precision.

    Some thirty layers of random weights lose about half of 8 bits.
    """
    assert logits.isfinite().all()
    error = ((logits.float() - exact).square().mean().sqrt() / exact.std()).item()
    assert error < 0.2, f"off by {error:.2f} standard deviations"


def check_pipelines(name: str, image: Image.Image, path: str, expected: dict[str, torch.Tensor]):
    processor = open_with(AutoImageProcessor, name)
    outputs = SemanticSegmenterOutput(logits=expected["logits"])
    target_sizes = [(image.height, image.width)]

    with way(f"{name}: pipeline {HARD}, labeled hard masks"):
        with no_error_logged():
            segment = pipeline(HARD, name, trust_remote_code=True)
            found = segment(image)
        (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes)
        assert [one["label"] for one in found] == [segment.model.config.id2label[i] for i in labels.unique().tolist()]
        for one in found:
            assert (one["mask"].mode, one["mask"].size) == ("L", image.size), one["mask"]
            wanted = (labels == segment.model.config.label2id[one["label"]]).numpy() * 255
            assert np.array_equal(np.asarray(one["mask"]), wanted), one["label"]

    (probs,) = processor.post_process_masks(outputs, target_sizes)
    with way(f"{name}: pipeline {SOFT}, by its name"), no_error_logged():
        find = pipeline(SOFT, name, trust_remote_code=True)
    array = np.asarray(image)
    calls = {
        "a path": lambda: [find(path)],
        "an image": lambda: [find(image)],
        "an array": lambda: [find(array)],
        "a list, batch_size=2": lambda: find([image, path, array], batch_size=2),
        "a generator": lambda: list(find(one for one in (image, path, array))),
        "a generator, batch_size=2": lambda: list(find((one for one in (image, path, array)), batch_size=2)),
    }
    for kind, call in calls.items():
        with way(f"{name}: pipeline {SOFT}, soft masks of {kind}"):
            found = call()
            assert len(found) == (1 if kind in ("a path", "an image", "an array") else 3)
            for one in found:
                # The inference form, and kernels for other batch sizes, sum in another order.
                torch.testing.assert_close(one["probs"], probs, rtol=0, atol=1e-5)
                assert (one["mask"].mode, one["mask"].size) == ("L", image.size), one["mask"]
                off = np.abs(np.asarray(one["mask"]) - 255 * probs.numpy()).max()
                assert off < 0.51, f"the mask is off by {off:.2f} of 255"

    check_large_images(name, find, image, expected["refined"])


def check_large_images(name: str, find: Pipeline, image: Image.Image, refined: torch.Tensor):
    large = enlarged(image)
    with way(f"{name}: pipeline {SOFT}, refined edges of a large image"):
        found = find(large)
        check_equal(found["probs"], refined)
        assert (found["mask"].mode, found["mask"].size) == ("L", large.size), found["mask"]
        assert not torch.equal(find(large, refine="never")["probs"], refined)
    with way(f"{name}: pipeline {SOFT}, refined edges in a batch"):
        small, *many = find([image, large, large], batch_size=2)
        assert small["mask"].size == image.size, small["mask"]
        for one in many:
            # Rounding errors can move the refined band by a pixel.
            assert ((one["probs"] - refined).abs() > 1e-4).float().mean() < 0.01
    estimates = importlib.util.find_spec("pymatting") is not None
    whose = "object" if estimates else "image"
    with way(f"{name}: pipeline {SOFT}, cut-out in {whose} colors"):
        found = find(large, cutout=True)
        pixels = np.asarray(found["cutout"])
        assert (found["cutout"].mode, found["cutout"].size) == ("RGBA", large.size), found["cutout"]
        opacity = ((np.asarray(found["mask"]) / 255 - 0.3) / 0.6).clip(0, 1)
        assert np.abs(pixels[..., 3] / 255 - opacity).max() < 0.01
        changed = (pixels[..., :3] != np.asarray(large)).any(-1)
        assert changed.any() == estimates
        for mask in (found["mask"], found["probs"], found["probs"].numpy()):
            assert np.array_equal(np.asarray(find.cut_out(large, mask)), pixels)


def check(name: str):
    path = cached_file(name, "image.png")
    expected = load_file(cached_file(name, "expected.safetensors"))
    with Image.open(path) as file:
        image = file.convert("RGB")
    check_auto_classes(name, image, expected)
    check_pipelines(name, image, path, expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="FOLDER_OR_HUB_ID")
    parser.add_argument(
        "--allow-packages", action="store_true", help=f"continue although one of {', '.join(ABSENT)} is installed"
    )
    arguments = parser.parse_args()
    if not arguments.allow_packages:
        present = [name for name in ABSENT if importlib.util.find_spec(name)]
        if present:
            sys.exit(f"error: got installed {', '.join(present)}, expected a bare environment; see --allow-packages")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # as for the expected numbers
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for name in arguments.names:
        check(name)


if __name__ == "__main__":
    main()
