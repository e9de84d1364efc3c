"""Check and build the parts of a training run."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from omegaconf.errors import OmegaConfBaseException
from PIL import ExifTags, Image
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, cached_file
from transformers.utils import logging as transformers_logging
from yaml import YAMLError

from ..data.loading import UnreadableSample, check_pair, encoded, only_value, read_pair, row_name
from ..data.mixing import join_sets, load_sets
from ..data.streaming import Stream, open_streams
from ..data.transforms import TransformRecipe
from ..hub.encoders import PACKAGED, packaged_encoder
from ..hub.shipped import resolve
from ..models.image_processing_unconceal import UnconcealImageProcessor
from ..models.networks import NETWORKS
from ..utils.devices import gains_from_bfloat16
from ..utils.digests import weights_digest
from ..utils.errors import UserError, one_line
from ..utils.files import is_hub_id, make_folder, replacing
from ..utils.images import size_text
from ..utils.loading_errors import loading_explained
from .checkpoints import RECIPE_FILE, read_record
from .earlier_run import bring_back, check_apart, check_own, holds_run, parts_of_run, set_aside
from .recipe import DataRecipe, Recipe, drop_old_switches, dump_recipe, flatten, parse_recipe


logger = logging.getLogger(__name__)

# Keys that may differ when a run is resumed. They do not change its result.
FREE_KEYS = {"output_dir", "data.num_workers", "data.max_unreadable", "trackers", "save_every", "total_limit"}
FREE_KEYS |= {"log_every"}
CHECK_RECIPE = "check these values in the recipe; if they are right"


def load_data(recipe: DataRecipe) -> dict[str, Dataset]:
    """Load the training and the evaluation split, of all data sets together.

    Raises:
        UserError: If a data set cannot be used.
    """
    return join_sets(open_sets(recipe))


def open_sets(recipe: DataRecipe) -> list[dict[str, Dataset]]:
    """Load the splits of each data set of a recipe.

    Raises:
        UserError: If one cannot be used.
    """
    if recipe.streaming:
        return [open_streams(recipe.path, recipe.train_split, recipe.eval_split)]
    return load_sets(recipe.paths, recipe.train_split, recipe.eval_split, recipe.split_seed)


def first_rows(rows: Dataset | Stream) -> Dataset:
    """Return all rows, or those of a stream that can be checked."""
    return rows.head if isinstance(rows, Stream) else rows


def check_masks(splits: dict[str, Dataset], recipe: DataRecipe, tasks: list[str]):
    """Check that masks show an object and its background.

    Raises:
        UserError: If all masks for training a segmentation are one value, or if one cannot be read.
    """
    if "segmentation" not in tasks:
        return
    rows = splits[recipe.train_split]
    if isinstance(rows, Stream):
        if problem := only_value(rows.head, max_unreadable=1):
            logger.warning("split %s: the first %d rows: %s", recipe.train_split, len(rows.head), problem)
    elif problem := only_value(rows, recipe.max_unreadable):
        raise UserError(
            f"split {recipe.train_split} of {', '.join(recipe.paths)}: {problem}, so there is nothing to learn; "
            "check its masks"
        )
    check_pairs(recipe.eval_split, splits[recipe.eval_split])
    if problem := only_value(splits[recipe.eval_split]):
        logger.warning("split %s: %s, so its scores say little", recipe.eval_split, problem)


def check_folder(output_dir: Path, recipe: Recipe, resume: bool, overwrite: bool):
    """Check the output folder: writable, without another run, without files of others.

    Raises:
        UserError: If it cannot be used.
    """
    if resume and overwrite:
        raise UserError("got --resume and --overwrite; choose one: go on with the run, or replace it")
    make_folder(output_dir)
    if not resume and not overwrite and holds_run(output_dir):
        raise UserError(f"{output_dir} already holds a run; add --resume, --overwrite or output_dir=ANOTHER")
    check_own(output_dir, recipe.phases, resume)
    bring_back(output_dir)  # a kill before the first checkpoint can have left it aside
    held, file = parts_of_run(output_dir), output_dir / RECIPE_FILE
    if overwrite:
        sources = [("data.path", path) for path in recipe.data.paths]
        for task, phase in recipe.phases.items():
            sources.append((f"phases.{task}.init_from", phase.init_from))
            sources.append((f"phases.{task}.init_backbone_from", phase.init_backbone_from))
        check_apart(output_dir, sources)
    elif held and not file.exists():
        raise UserError(f"cannot resume the run in {output_dir}: it has no {RECIPE_FILE}; choose output_dir=ANOTHER")
    if not held or overwrite:
        return
    kept = read_kept_recipe(file)
    drop_old_switches(kept["network"], kept["model"], file)
    old, new = flatten(kept), flatten(asdict(parse_recipe(dump_recipe(recipe))))
    if recipe.mixed_precision == "auto":
        new["mixed_precision"] = old["mixed_precision"]
    changed = sorted(key for key in (old | new).keys() - FREE_KEYS if old.get(key) != new.get(key))
    if changed:
        raise UserError(
            f"the run in {output_dir} was started with another {', '.join(changed)}; "
            "resume it with the same recipe, or start from scratch with output_dir=ANOTHER"
        )


def read_kept_recipe(file: Path) -> dict[str, Any]:
    """Return the recipe that a run was started with.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        return asdict(parse_recipe(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(
            f"cannot resume: {file} is damaged ({one_line(error)}); write it again as it was, or start from scratch "
            "with output_dir=ANOTHER"
        ) from error


def choose_precision(recipe: Recipe, resume: bool, device: torch.device) -> str | None:
    """Return the mixed precision of a run; replaces auto.

    A resumed run keeps what it began with. A line in the log says if the device is not faster in bfloat16.
    """
    precision = recipe.mixed_precision
    if precision == "auto":
        file = Path(recipe.output_dir) / RECIPE_FILE
        precision = read_kept_recipe(file)["mixed_precision"] if resume else "bf16"
        if precision == "bf16" and not gains_from_bfloat16(device):
            precision = precision if resume else "no"
            consequence = "the run goes on in it, slowly" if resume else "training in float32"
            logger.warning("mixed_precision: %s is not faster in bfloat16; %s", device, consequence)
    return precision


def check_batch_norms(recipe: Recipe, state: PartialState):
    """Raise `UserError` if batch norms cannot be common to all processes."""
    if recipe.sync_batch_norm and state.num_processes > 1 and state.device.type != "cuda":
        raise UserError(f"sync_batch_norm needs GPUs, got several processes on {state.device}; set it to false")


def check_compiler(device: torch.device):
    """Compile a trial function, to find out early that it is impossible.

    Raises:
        UserError: If there is no compiler.
    """
    try:
        torch.compile(lambda values: values.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of any class: from torch, from Triton or from the compiler
        raise UserError(
            f"compile=true: torch cannot compile for {device} here ({one_line(error)}); install a C++ compiler, "
            "or on a GPU Triton, or set compile=false"
        ) from error


def check_same_data(before: list[dict[str, Any]], data: list[dict[str, Any]], output_dir: str):
    """Check that a resumed phase finds its data unchanged.

    Args:
        before: The data sets on record, as `describe_set` describes them. None are left in a new phase.
        data: The data sets that were found now.
        output_dir: Folder of the run.

    Raises:
        UserError: If a data set has changed.
    """
    kept = {one["path"]: one for one in before}
    for one in data:
        old, got = kept.get(one["path"], {}), None
        if old.get("images", one["images"]) != one["images"]:
            got = f"had {old['images']} images, got {one['images']}"
        elif changed := [split for split, value in old.get("sha256", {}).items() if one["sha256"].get(split) != value]:
            got = f"had other images, masks or ids in {', '.join(changed)}"
        if got:
            raise UserError(
                f"cannot resume the run in {output_dir}: the data set {one['path']} {got}; give it the same images, "
                "or start from scratch with output_dir=ANOTHER"
            )


def claim_folder(output_dir: Path, recipe: Recipe, resume: bool):
    """Write the recipe of a new run; an earlier run stands aside."""
    file = output_dir / RECIPE_FILE
    if resume:
        return
    set_aside(output_dir)
    with replacing(file) as beside:
        beside.write_text(dump_recipe(recipe), encoding="utf-8")


def check_start(recipe: Recipe, task: str, resume: bool, splits: dict[str, Dataset] | None = None):
    """Try a phase's model without computing, to find mistakes early.

    With `splits`, the sizes of their images are checked too.

    Raises:
        UserError: If recipe, checkpoint and encoder do not go together.
    """
    phase, model_class = recipe.phases[task], NETWORKS[recipe.network].tasks[task]
    # The configuration first: it reports a missing checkpoint.
    config, processor = build_config(recipe, phase.init_from), build_processor(recipe, phase.init_from)
    color = (40, 120, 200)
    with loading_explained("recipe: model", CHECK_RECIPE), torch.device("meta"):
        model = model_class(config).eval()
    with loading_explained("recipe: processor", CHECK_RECIPE):
        pixel_values = processor(Image.new("RGB", (64, 64), color))["pixel_values"]
        model.check_pixel_values(pixel_values)
    with loading_explained("recipe: model", CHECK_RECIPE):
        model(pixel_values.to("meta"))
    train, crop_size = recipe.data.train_split, recipe.data.transforms.crop_size
    height, width = (crop_size, crop_size) if crop_size else pixel_values.shape[-2:]
    batch_size = phase.batch_size
    if splits and not processor.do_resize:
        if not crop_size:
            rows, are_equal = first_rows(splits[train]), phase.batch_size > 1
            width, height = check_sizes(train, rows, model.min_image_size, are_equal) or (width, height)
            if are_equal:
                check_changes(recipe.data.transforms, width, height)
        if task != "segmentation":  # the evaluation of that one pads small images
            check_sizes(recipe.data.eval_split, splits[recipe.data.eval_split], model.min_image_size, False)
    if splits and not isinstance(splits[train], Stream):
        batch_size = min(batch_size, len(splits[train]))
    check_batch(model.train(), batch_size, pixel_values.new_empty(1, pixel_values.shape[1], height, width))
    plain = model.denormalize(pixel_values)
    if plain is not None:
        seen = plain.mean(dim=(0, 2, 3)) * 255
        if not torch.allclose(seen, torch.tensor(color, dtype=seen.dtype), atol=0.5):
            raise UserError(
                "recipe: processor: the network cannot undo its normalization; set the same image_mean and image_std "
                "in processor and model, and leave do_rescale and do_normalize on"
            )
    if (phase.init_from or phase.init_backbone_from) and not resume:
        load_start(recipe, task, phase.init_from)


def check_batch(model: PreTrainedModel, batch_size: int, pixel_values: torch.Tensor):
    """Check that batch normalization has enough values.

    `pixel_values` (1, C, H, W) has the size of an image.

    Raises:
        UserError: If a batch has one value a channel.
    """
    height, width = pixel_values.shape[-2:]
    try:
        model(pixel_values.expand(batch_size, -1, -1, -1).to("meta"))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"the network cannot train on {batch_size} image of {width}x{height} pixels at a time: batch "
            "normalization would have one value a channel; raise batch_size, or the number or size of the images"
        ) from error


def check_sizes(split: str, dataset: Dataset, at_least: int, are_equal: bool) -> tuple[int, int] | None:
    """Check images that are not resized; return the smallest width and height.

    Args:
        split: Name of the split.
        dataset: Its rows.
        at_least: Smallest side that the network takes.
        are_equal: Whether the images go into batches, so that all need one size.

    Raises:
        UserError: If an image is too small, or if two differ in size.
    """
    files = encoded(dataset, "image")["image"]
    sizes = {row: size for row, file in enumerate(files) if file and (size := displayed_size(file))}
    first = next(iter(sizes.values()), None)
    for row, size in sizes.items():
        where = f"processor.do_resize is false, but the images of split {split}"
        if min(size) < at_least:
            raise UserError(
                f"{where} are too small: {row_name(dataset, row)} has {size_text(size)}, expected at least "
                f"{at_least}x{at_least}; leave it out, or set processor.do_resize=true"
            )
        if are_equal and size != first:
            raise UserError(
                f"{where} differ in size: {size_text(first)} and, in {row_name(dataset, row)}, {size_text(size)}; set "
                "data.transforms.crop_size, processor.do_resize=true, or a batch_size of 1"
            )
    return min(sizes.values(), key=lambda size: size[0] * size[1], default=None)


def check_changes(recipe: TransformRecipe, width: int, height: int):
    """Check that images of one size, which are not resized, keep it.

    Raises:
        UserError: If a change of training samples gives them other sizes.
    """
    setting = None
    if recipe.rotate90_probability and width != height:
        setting = "rotate90_probability"
    elif recipe.max_crop_ratio:
        setting = "max_crop_ratio"
    if setting:
        raise UserError(
            f"processor.do_resize is false, and data.transforms.{setting} changes the size of images of "
            f"{width}x{height}, which then do not fit into one batch; set it to 0, or set "
            "data.transforms.crop_size or processor.do_resize=true"
        )


def check_pairs(split: str, dataset: Dataset):
    """Read all images and masks of a split once.

    Raises:
        UserError: If one is missing or cannot be read, or if a mask differs in size from its image.
    """

    def check(row: int):
        pair = read_pair(dataset, row)[1:]
        check_pair(*pair, lambda: row_name(dataset, row))

    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(check, range(len(dataset))))  # the first error cancels the rest
    except UnreadableSample as error:
        raise UserError(f"split {split}: {error}") from error


def displayed_size(file: dict[str, Any]) -> tuple[int, int] | None:
    """Return width and height; None for an unreadable header."""
    source = BytesIO(file["bytes"]) if file["bytes"] else file["path"]
    with suppress(OSError, Image.DecompressionBombError), Image.open(source) as image:
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        return image.size[::-1] if is_turned else image.size
    return None


def find_start(init_from: str | Path) -> str | Path:
    """Return the folder or Hub id that `init_from` names.

    Raises:
        UserError: If there is none.
    """
    try:
        init_from = resolve(init_from)
    except UserError as error:
        raise UserError(f"cannot start from {init_from}: {error}") from error
    if not Path(init_from).exists() and not is_hub_id(init_from):
        raise UserError(f"cannot start from {init_from}: no such folder, and a Hub id has the form owner/name")
    if Path(init_from).is_dir() and not (Path(init_from) / CONFIG_NAME).is_file():
        inside = sorted(path.parent.relative_to(init_from) for path in Path(init_from).glob(f"**/best/{CONFIG_NAME}"))
        advice = f"did you mean {Path(init_from) / inside[-1]}?" if inside else "give the folder of a checkpoint"
        raise UserError(f"cannot start from {init_from}: it has no {CONFIG_NAME}; {advice}")
    return init_from


def build_config(recipe: Recipe, init_from: str | Path | None) -> PreTrainedConfig:
    """Return the configuration of checkpoint or network, changed by `recipe.model`.

    Raises:
        UserError: If the checkpoint is missing or of another network, or the values do not fit together.
    """
    config_class = NETWORKS[recipe.network].config_class
    if init_from is None:
        with loading_explained("recipe: model", CHECK_RECIPE):
            return config_class(**recipe.model)
    init_from = find_start(init_from)
    check = "if its files were not edited and the values in the recipe are right"
    with loading_explained(f"cannot start from {init_from}", check):
        kept = config_class.get_config_dict(init_from)[0]
        found = kept.get("model_type")
        if found != config_class.model_type:
            raise ValueError(f"it holds a network of type {found}, expected {config_class.model_type}")
        # `from_pretrained` would change the fields after it has checked them.
        return config_class.from_dict({**kept, **recipe.model})


def build_processor(recipe: Recipe, init_from: str | Path | None) -> UnconcealImageProcessor:
    """Return the image processor: the checkpoint's or the default, changed by `recipe.processor`.

    Raises:
        UserError: If the values do not fit together.
    """
    init_from = init_from and find_start(init_from)
    with loading_explained("recipe: processor", CHECK_RECIPE):
        # Checkpoints published by others may have no image processor.
        if init_from and cached_file(init_from, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False):
            return UnconcealImageProcessor.from_pretrained(init_from, **recipe.processor)
        return UnconcealImageProcessor(**recipe.processor)


def build_model(recipe: Recipe, task: str, init_from: str | Path | None) -> PreTrainedModel:
    """Build the model of a phase, as `start_model` does."""
    return start_model(recipe, task, init_from)[0]


def start_model(recipe: Recipe, task: str, init_from: str | Path | None) -> tuple[PreTrainedModel, set[str]]:
    """Build the model of a phase, from scratch or from a checkpoint.

    Returns:
        The model, and the names of the weights that the checkpoint lacks: they are random.

    Raises:
        UserError: If the checkpoint is missing, damaged, of another network, or of other sizes.
    """
    init_from = init_from and find_start(init_from)
    config, model_class = build_config(recipe, init_from), NETWORKS[recipe.network].tasks[task]
    if init_from is None:
        model = model_class(config)
        return model, set(model.state_dict())
    with quiet_loading(), loading_explained(f"cannot start from {init_from}"):
        model, report = model_class.from_pretrained(
            init_from, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"cannot start from {init_from}: {len(report['mismatched_keys'])} of its weights have another shape than "
            f"the recipe's network, e.g. {name} {tuple(found)}, expected {tuple(expected)}; "
            f"set the recipe's `model` as in its {CONFIG_NAME}"
        )
    if not set(model.state_dict()) - set(report["missing_keys"]):
        raise UserError(f"cannot start from {init_from}: it holds no weights of {model_class.__name__}")
    return model, set(report["missing_keys"])


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' report of new weights, which are expected here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def load_backbone(model: PreTrainedModel, source: str) -> dict | None:
    """Load the encoder's pretrained weights; return the record beside them.

    `source` is `init_backbone_from` of a recipe.

    Raises:
        UserError: If the weights are missing, cannot be reached, or are of another encoder.
    """
    with quiet_loading(), loading_explained(f"cannot start the encoder from {source}"):
        if source in PACKAGED and not Path(source).exists():
            with packaged_encoder(source) as folder:
                model.load_backbone(str(folder))
                return read_record(folder)
        on_hub = not Path(source).exists() and is_hub_id(source)
        if on_hub and not cached_file(source, CONFIG_NAME, _raise_exceptions_for_connection_errors=False):
            raise UserError(
                f"cannot reach the Hub for {source}, the encoder's pretrained weights; connect and rerun, set "
                "init_backbone_from to a folder, or to null for random weights"
            )
        model.load_backbone(source)
        return read_record(source)


def load_start(recipe: Recipe, task: str, init_from: str | Path | None) -> tuple[PreTrainedModel, dict | None]:
    """Build the model of a phase; describe its first weights.

    Returns:
        The model, and what goes into the record of the training. None stands for random weights.

    Raises:
        UserError: As `start_model` and `load_backbone`, and if weights are not finite.
    """
    network, new = start_model(recipe, task, init_from)
    source = init_from or recipe.phases[task].init_backbone_from
    if not source:
        return network, None
    if init_from:
        part, loaded, before = "network", network, read_record(find_start(init_from))
    else:
        before = load_backbone(network, source)
        part, loaded, new = "encoder", network.backbone, set()
    damaged = [name for name, weight in loaded.state_dict().items() if not weight.isfinite().all()]
    if damaged:
        raise UserError(
            f"cannot start from {source}: {len(damaged)} of its weights are not finite (NaN or infinity), e.g. "
            f"{damaged[0]}; give another checkpoint"
        )
    facts = {"part": part, "source": str(source), "sha256": weights_digest(loaded), "num_random": len(new)}
    return network, {**facts, "from_hub": is_hub_id(source) and not Path(source).exists(), "before": before}
