"""Recipes: what a YAML file says about a training run, as typed dataclasses.

A recipe never describes architecture, but for `model`, which is handed to the network's own configuration class.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import CONFIG_MAPPING
from yaml import YAMLError

from ..data.transforms import TransformRecipe
from ..evaluation.protocols import PROTOCOLS
from ..models import NETWORKS
from ..models.image_processing_unconceal import UnconcealImageProcessor
from ..utils.errors import UserError


@dataclass
class DataRecipe:
    """The data set and its reading.

    Args:
        path: Folder of scripts/prepare_data.py, or id of a data set on the Hub.
        train_split: Split to train on.
        eval_split: Split to choose the best checkpoint on.
        num_workers: Loader processes beside each training process.
        transforms: Random changes of the training samples.
    """

    path: str = MISSING
    train_split: str = "train"
    eval_split: str = "val"
    num_workers: int = 2
    transforms: TransformRecipe = field(default_factory=TransformRecipe)


@dataclass
class OptimizerRecipe:
    """The optimizer.

    Args:
        name: sgd, adam or adamw.
        learning_rate: At the start, after any warm-up.
        weight_decay: L2 penalty of sgd and adam, decoupled decay of adamw.
        momentum: Of sgd; the others keep their usual betas.
    """

    name: str = "sgd"
    learning_rate: float = 0.01
    weight_decay: float = 1e-4
    momentum: float = 0.9


@dataclass
class ScheduleRecipe:
    """The learning rate over the steps of a phase.

    Args:
        name: polynomial (down to 0), cosine (down to 0) or constant.
        power: Of polynomial.
        warmup_steps: Steps of linear rise before it.
    """

    name: str = "polynomial"
    power: float = 0.9
    warmup_steps: int = 0


@dataclass
class PhaseRecipe:
    """One training phase; a network may need several, each starting from the best checkpoint of the one before.

    Args:
        epochs: Passes over the training split.
        batch_size: Samples in one forward pass of one process.
        gradient_accumulation_steps: Forward passes in one optimizer step.
        max_grad_norm: Gradients are scaled down to this norm; None never does.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        ema_decay: Keep a running mean of the weights with this decay, and evaluate and save that; None does not.
        evaluate_every: Epochs between evaluations; the last epoch always has one.
        init_from: Checkpoint folder or Hub id to start from, as for fine-tuning, instead of the phase before.
        init_backbone_from: Folder or Hub id, owner/name, of pretrained weights for the encoder, of networks that have a
            backbone. Where the Hub cannot be reached, the encoder starts at random, with a warning. Not beside
            `init_from`, which brings an encoder.
        optimizer: The optimizer.
        schedule: The learning rate schedule.
    """

    epochs: int = MISSING
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    gradient_checkpointing: bool = False
    ema_decay: float | None = None
    evaluate_every: int = 1
    init_from: str | None = None
    init_backbone_from: str | None = None
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)


@dataclass
class Recipe:
    """A training run.

    Args:
        network: Name of the network.
        output_dir: Folder for checkpoints and logs.
        phases: Training phases in order, by the task that each trains.
        data: The data set.
        model: Fields of the network's configuration that differ from its defaults.
        processor: Fields of the image processor that differ from its defaults.
        seed: Of the weights, the order of the samples and their random changes.
        mixed_precision: no, fp16 or bf16; None leaves it to `accelerate launch`.
        channels_last: Store activations channels-last, which some machines convolve faster.
        trackers: Loggers by Accelerate's names.
        protocol: How the evaluation of a segmentation scores, one of `metrics.PROTOCOLS`.
        best_metric: Number of that protocol that chooses the best checkpoint of a segmentation.
    """

    network: str = MISSING
    output_dir: str = MISSING
    phases: dict[str, PhaseRecipe] = MISSING
    data: DataRecipe = field(default_factory=DataRecipe)
    model: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    mixed_precision: str | None = None
    channels_last: bool = False
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    protocol: str = "segmentation"
    best_metric: str = "iou"


CHOICES = {
    "mixed_precision": (None, "no", "fp16", "bf16"),
    "protocol": tuple(PROTOCOLS),
    "optimizer.name": ("sgd", "adam", "adamw"),
    "schedule.name": ("polynomial", "cosine", "constant"),
}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, then apply dotted overrides such as `phases.segmentation.epochs=5`.

    Raises:
        UserError: If the file cannot be read, a key is unknown, a value has another type or is not allowed, or a required
            one is missing; the message names the key.
    """
    path = Path(path)
    try:
        written = OmegaConf.create(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"recipe {path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(written, DictConfig):
        raise UserError(f"recipe {path} is a list, expected key: value lines")
    for override in overrides or []:
        if "=" not in override:
            raise UserError(f"got override {override!r}, expected key=value such as data.path=data/sirst")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), written, OmegaConf.from_dotlist(list(overrides or [])))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"recipe {path} lacks {', '.join(missing)}; set it there or as {missing[0]}=VALUE")
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"recipe {path}: {_describe(error)}") from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"recipe {path}: {_one_line(error)}") from None
    _check(recipe, path)
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain containers, for logging and for saving beside checkpoints."""
    return dataclasses.asdict(recipe)


def _check(recipe: Recipe, path: Path):
    """Refuse what the types alone let through."""

    def refuse(key: str, got: Any, expected: str):
        raise UserError(f"recipe {path}: {key} is {got!r}, expected {expected}")

    if recipe.network not in NETWORKS:
        refuse("network", recipe.network, f"one of {', '.join(NETWORKS)}")
    network = NETWORKS[recipe.network]
    if not recipe.phases:
        refuse("phases", {}, f"at least one of {', '.join(network.tasks)}")
    known_fields = {
        "model": {field.name for field in dataclasses.fields(network.config_class)},
        "processor": set(UnconcealImageProcessor.valid_kwargs.__annotations__),
    }
    for part, known in known_fields.items():
        unknown = sorted(set(getattr(recipe, part)) - known)
        if unknown:
            refuse(part, unknown[0], f"a field of the network's {'configuration' if part == 'model' else part}")
    backbone = recipe.model.get("backbone_config")
    if isinstance(backbone, dict) and backbone.get("model_type") in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[backbone["model_type"]]
        known = {field.name.removeprefix("_") for field in dataclasses.fields(config_class)}
        unknown = sorted(set(backbone) - known - set(config_class.attribute_map) - {"model_type"})
        if unknown:
            refuse("model.backbone_config", unknown[0], f"a field of the configuration of {backbone['model_type']}")
    values = {"mixed_precision": recipe.mixed_precision, "protocol": recipe.protocol}
    positive, at_least_0 = {}, {"seed": recipe.seed, "data.num_workers": recipe.data.num_workers}
    for task, phase in recipe.phases.items():
        if task not in network.tasks:
            refuse("phases", task, f"only {', '.join(network.tasks)}")
        if phase.init_backbone_from and phase.init_from:
            refuse(f"phases.{task}.init_backbone_from", phase.init_backbone_from, "null beside init_from")
        if phase.init_backbone_from and not hasattr(network.tasks[task], "load_backbone"):
            refuse(
                f"phases.{task}.init_backbone_from",
                phase.init_backbone_from,
                f"null, as {recipe.network} has no backbone",
            )
        values[f"phases.{task}.optimizer.name"] = phase.optimizer.name
        values[f"phases.{task}.schedule.name"] = phase.schedule.name
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "evaluate_every"):
            positive[f"phases.{task}.{name}"] = getattr(phase, name)
        positive[f"phases.{task}.optimizer.learning_rate"] = phase.optimizer.learning_rate
        if phase.max_grad_norm is not None:
            positive[f"phases.{task}.max_grad_norm"] = phase.max_grad_norm
        if phase.ema_decay is not None and not 0 < phase.ema_decay < 1:
            refuse(f"phases.{task}.ema_decay", phase.ema_decay, "a number between 0 and 1")
    for key, value in values.items():
        allowed = CHOICES[".".join(key.split(".")[-2:])]
        if value not in allowed:
            refuse(key, value, f"one of {', '.join(map(str, allowed))}")
        for name in ("weight_decay", "momentum"):
            at_least_0[f"phases.{task}.optimizer.{name}"] = getattr(phase.optimizer, name)
        at_least_0[f"phases.{task}.schedule.warmup_steps"] = phase.schedule.warmup_steps
    best_metrics = PROTOCOLS[recipe.protocol].best_metrics
    if recipe.best_metric not in best_metrics:
        refuse("best_metric", recipe.best_metric, f"one of {', '.join(best_metrics)} (protocol {recipe.protocol})")
    for key, value in positive.items():
        if not 0 < value < math.inf:
            refuse(key, value, "more than 0")
    for key, value in at_least_0.items():
        if not 0 <= value < math.inf:
            refuse(key, value, "0 or more")
    trackers = sorted(tracker.value for tracker in get_available_trackers())
    for tracker in recipe.trackers:
        if tracker not in trackers:
            refuse("trackers", tracker, f"one that is installed: {', '.join(trackers)}")
    transforms = dataclasses.asdict(recipe.data.transforms)
    crop_size = transforms.pop("crop_size")
    for name, value in transforms.items():
        if name.endswith("_probability"):
            if not 0 <= value <= 1:
                refuse(f"data.transforms.{name}", value, "from 0 to 1")
        elif not 0 <= value < math.inf:
            refuse(f"data.transforms.{name}", value, "0 or more")
    if transforms["max_crop_ratio"] >= 1:
        refuse("data.transforms.max_crop_ratio", transforms["max_crop_ratio"], "less than 1")
    if transforms["max_rotation"] > 180:
        refuse("data.transforms.max_rotation", transforms["max_rotation"], "at most 180 degrees")
    smallest = max(model_class.min_image_size for model_class in network.tasks.values())
    if crop_size is not None and crop_size < smallest:
        refuse("data.transforms.crop_size", crop_size, f"at least {smallest}")


def _describe(error: OmegaConfBaseException) -> str:
    """Name the key, and say what was expected of it."""
    key = getattr(error, "full_key", None)
    message = _one_line(error)
    if message.startswith("Key '") and "not in" in message:
        fields = [field.name for field in dataclasses.fields(error.object_type)] if error.object_type else []
        return f"unknown key {key}; expected one of {', '.join(fields)}"
    return f"{key}: {message}" if key else message


def _one_line(error: Exception) -> str:
    """The message without omegaconf's own appendix of types."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if not line.startswith(("full_key", "object_type", "reference_type")))
