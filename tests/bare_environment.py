"""Open saved networks in every way that people try who have torch, transformers and Pillow, and not this package.

    python -I tests/bare_environment.py FOLDER_OR_HUB_ID ...

Each holds, beside the network and its processor, `picture.png` and what the network made of it where it was saved, in
`expected.safetensors`: `pixel_values`, `logits`, and of `enlarged(picture)` the mask, `refined`.
tests/save_tiny_models.py writes such folders. A line is printed for each way; the first that fails ends all with exit
code 1.
"""

# ruff: noqa: T201
import argparse
import importlib.util
import logging
import sys
import traceback
from contextlib import contextmanager
from functools import partial

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
# By the class itself: transformers 5.17 has AutoImageProcessor at the top only beside torchvision, which it does not need.
PROCESSORS = (AutoImageProcessor, AutoProcessor)
MODELS = (AutoModel, AutoModelForImageSegmentation, AutoModelForSemanticSegmentation)
HARD, SOFT = "image-segmentation", "soft-image-segmentation"


def enlarged(picture: Image.Image) -> Image.Image:
    """Return a picture of several times the network's size, whose edges are looked at again."""
    return picture.resize((4 * picture.width, 4 * picture.height))


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
    """Fail if transformers logs an error, which it does where it then goes on."""
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
    # An installed package that registers itself would take over from the files.
    assert type(opened).__module__.startswith("transformers_modules."), type(opened)
    return opened


def code_that_ran() -> set[str]:
    return {module for module in sys.modules if module.startswith("transformers_modules.")}


def check_refusals(name: str):
    """Nothing opens, and no code of the folder runs, where people do not trust it."""
    before = code_that_ran()
    # Not AutoProcessor: it drops the reason why no processor opens.
    openers = {one.__name__: one.from_pretrained for one in (AutoConfig, AutoImageProcessor, *MODELS)}
    openers |= {f"pipeline {task}": partial(pipeline, task) for task in (HARD, SOFT)}
    for opener, function in openers.items():
        with way(f"{name}: {opener} refuses without trust_remote_code"):
            try:
                function(name, trust_remote_code=False)
            except ValueError as error:
                assert "trust_remote_code" in str(error), error
            else:
                raise AssertionError("opened")
            assert code_that_ran() == before, code_that_ran() - before


def check_auto_classes(name: str, picture: Image.Image, expected: dict[str, torch.Tensor]):
    with way(f"{name}: AutoConfig"):
        config = open_with(AutoConfig, name)
        assert set(config.id2label) == {0, 1}, config.id2label
    for auto_class in PROCESSORS:
        with way(f"{name}: {auto_class.__name__}, equal pixel_values"):
            pixel_values = open_with(auto_class, name)(images=picture, return_tensors="pt").pixel_values
            check_equal(pixel_values, expected["pixel_values"])
    for auto_class in MODELS:
        with way(f"{name}: {auto_class.__name__}, equal logits"), torch.no_grad():
            model = open_with(auto_class, name)
            assert type(model).__name__ == config.architectures[0], type(model)
            assert not model.training
            check_equal(model(pixel_values).logits, expected["logits"])
    for dtype in (torch.bfloat16, torch.float16):
        with way(f"{name}: AutoModelForImageSegmentation, {dtype}"), torch.no_grad():
            model = open_with(AutoModelForImageSegmentation, name, dtype=dtype)
            logits = model(pixel_values.to(dtype)).logits
            assert (model.dtype, logits.dtype) == (dtype, dtype), (model.dtype, logits.dtype)
            check_near(logits, expected["logits"])


def check_equal(tensor: torch.Tensor, exact: torch.Tensor):
    torch.testing.assert_close(tensor, exact, rtol=0, atol=0)


def check_near(logits: torch.Tensor, exact: torch.Tensor):
    """Half precision keeps 8 bits or 11, of which some thirty layers of random weights lose about half."""
    assert logits.isfinite().all()
    error = ((logits.float() - exact).square().mean().sqrt() / exact.std()).item()
    assert error < 0.2, f"off by {error:.2f} standard deviations"


def check_pipelines(name: str, picture: Image.Image, path: str, expected: dict[str, torch.Tensor]):
    processor = open_with(AutoImageProcessor, name)
    outputs = SemanticSegmenterOutput(logits=expected["logits"])
    target_sizes = [(picture.height, picture.width)]

    with way(f"{name}: pipeline {HARD}, labelled hard masks"):
        with no_error_logged():
            segment = pipeline(HARD, name, trust_remote_code=True)
            found = segment(picture)
        (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes)
        assert [one["label"] for one in found] == [segment.model.config.id2label[i] for i in labels.unique().tolist()]
        for one in found:
            assert (one["mask"].mode, one["mask"].size) == ("L", picture.size), one["mask"]
            wanted = (labels == segment.model.config.label2id[one["label"]]).numpy() * 255
            assert np.array_equal(np.asarray(one["mask"]), wanted), one["label"]

    (probs,) = processor.post_process_masks(outputs, target_sizes)
    with way(f"{name}: pipeline {SOFT}, by its name"), no_error_logged():
        find = pipeline(SOFT, name, trust_remote_code=True)
    array = np.asarray(picture)
    calls = {
        "a path": lambda: [find(path)],
        "a picture": lambda: [find(picture)],
        "an array": lambda: [find(array)],
        "a list, batch_size=2": lambda: find([picture, path, array], batch_size=2),
        "a generator": lambda: list(find(one for one in (picture, path, array))),
        "a generator, batch_size=2": lambda: list(find((one for one in (picture, path, array)), batch_size=2)),
    }
    for kind, call in calls.items():
        with way(f"{name}: pipeline {SOFT}, soft masks of {kind}"):
            found = call()
            assert len(found) == (1 if kind in ("a path", "a picture", "an array") else 3)
            for one in found:
                # Other batch sizes take other kernels, which sum in another order.
                torch.testing.assert_close(one["probs"], probs, rtol=0, atol=1e-5 if "batch" in kind else 0)
                assert (one["mask"].mode, one["mask"].size) == ("L", picture.size), one["mask"]
                off = np.abs(np.asarray(one["mask"]) - 255 * probs.numpy()).max()
                assert off < 0.51, f"the mask is off by {off:.2f} of 255"

    check_large_pictures(name, find, picture, expected["refined"])


def check_large_pictures(name: str, find: Pipeline, picture: Image.Image, refined: torch.Tensor):
    large = enlarged(picture)
    with way(f"{name}: pipeline {SOFT}, edges of a large picture looked at again"):
        found = find(large)
        check_equal(found["probs"], refined)
        assert (found["mask"].mode, found["mask"].size) == ("L", large.size), found["mask"]
        assert not torch.equal(find(large, refine="never")["probs"], refined)
    with way(f"{name}: pipeline {SOFT}, edges looked at again in a batch"):
        small, *many = find([picture, large, large], batch_size=2)
        assert small["mask"].size == picture.size, small["mask"]
        for one in many:
            # An edge decided by a rounding error may move the band in which tiles decide by a pixel.
            assert ((one["probs"] - refined).abs() > 1e-4).float().mean() < 0.01
    estimates = importlib.util.find_spec("pymatting") is not None
    whose = "the object's own" if estimates else "the picture's"
    with way(f"{name}: pipeline {SOFT}, cut-out in {whose} colours"):
        found = find(large, cutout=True)
        pixels = np.asarray(found["cutout"])
        assert (found["cutout"].mode, found["cutout"].size) == ("RGBA", large.size), found["cutout"]
        assert np.array_equal(pixels[..., 3], np.asarray(found["mask"]))
        changed = (pixels[..., :3] != np.asarray(large)).any(-1)
        assert changed.any() == estimates
        for mask in (found["mask"], found["probs"], found["probs"].numpy()):
            assert np.array_equal(np.asarray(find.cut_out(large, mask)), pixels)


def check(name: str):
    path = cached_file(name, "picture.png")
    expected = load_file(cached_file(name, "expected.safetensors"))
    with Image.open(path) as file:
        picture = file.convert("RGB")
    check_refusals(name)
    check_auto_classes(name, picture, expected)
    check_pipelines(name, picture, path, expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="FOLDER_OR_HUB_ID")
    parser.add_argument(
        "--allow-packages", action="store_true", help=f"go on where one of {', '.join(ABSENT)} is there"
    )
    arguments = parser.parse_args()
    if not arguments.allow_packages:
        present = [name for name in ABSENT if importlib.util.find_spec(name)]
        if present:
            sys.exit(f"error: this environment is not bare, it has {', '.join(present)}; see --allow-packages")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # as the expected numbers were made
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for name in arguments.names:
        check(name)


if __name__ == "__main__":
    main()
