"""Recipes of training runs: YAML files as typed dataclasses.

A recipe does not describe the architecture. The exception is `model`, which goes to the network's configuration class.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from accelerate.tracking import get_available_trackers
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import CONFIG_MAPPING
from yaml import YAMLError

from ..data.transforms import TransformRecipe
from ..evaluation.protocols import PROTOCOLS
from ..models.configuration_run import drop_removed_switches
from ..models.image_processing_unconceal import UnconcealImageProcessor
from ..models.networks import NETWORKS
from ..utils.errors import UserError
from ..utils.files import is_folder, with_home
from .checkpoints import MOST_CHECKPOINTS
from .saving import parse_interval


@dataclass
class DataRecipe:
    """The data and how it is read.

    Args:
        path: Folder that `unconceal prepare` wrote, id of a data set on the Hub, or a list of them.
        weights: Share of each data set of a list in an epoch, in any unit. An epoch has as many samples as all sets
            together have images. If the share is larger than the set, the whole set comes several times. If it is
            smaller, the next epoch has the images that this one left out. None takes every image once.
        train_split: Split to train on.
        eval_split: Split that chooses the best checkpoint, of all data sets together. A set of a list may lack it.
        split_seed: Seed that splits the images of both splits again at random, each data set by itself. Sizes and
            shares of each source stay. None keeps the splits as they are.
        max_unreadable: Largest share of the training images that may be unreadable. A line names them, and the next
            image takes their place. Beyond this share training stops; with 0 it stops at the first.
        streaming: Read the training split as a stream, without a download of all of it. For one data set of Parquet
            files. Each process reads its own files.
        shuffle_buffer: Images of a stream among which the next one is drawn, in undecoded form.
        num_workers: Loader processes for each training process.
        transforms: Random changes of the training samples.
    """

    path: Any = MISSING  # str | list[str]; OmegaConf has no such type
    weights: list[float] | None = None
    train_split: str = "train"
    eval_split: str = "val"
    split_seed: int | None = None
    max_unreadable: float = 0.01
    streaming: bool = False
    shuffle_buffer: int = 1000
    num_workers: int = 2
    transforms: TransformRecipe = field(default_factory=TransformRecipe)

    @property
    def paths(self) -> list[str]:
        """The data sets as a list."""
        return list(self.path) if isinstance(self.path, list) else [self.path]


@dataclass
class OptimizerRecipe:
    """The optimizer.

    Args:
        name: sgd, adam or adamw.
        learning_rate: Highest learning rate, reached after the warm-up.
        weight_decay: L2 penalty of sgd and adam, decoupled decay of adamw.
        momentum: Momentum of sgd. The others keep their usual betas.
        encoder_lr_ratio: Learning rate of the encoder, as a multiple of `learning_rate`. A pretrained encoder needs
            less than the new layers. Only for networks with a backbone, as the two settings of the encoder in
            `PhaseRecipe`.
    """

    name: str = "sgd"
    learning_rate: float = 0.01
    weight_decay: float = 1e-4
    momentum: float = 0.9
    encoder_lr_ratio: float = 1.0


@dataclass
class ScheduleRecipe:
    """The learning rate over the steps of a phase.

    Args:
        name: polynomial (down to 0), cosine (down to 0) or constant.
        power: Exponent of polynomial.
        warmup_steps: Steps of linear increase at the start.
    """

    name: str = "polynomial"
    power: float = 0.9
    warmup_steps: int = 0


@dataclass
class PhaseRecipe:
    """One training phase; the next one starts from its best checkpoint.

    Args:
        epochs: Passes over the training split.
        batch_size: Samples in one forward pass of one process.
        gradient_accumulation_steps: Forward passes in one optimizer step.
        max_grad_norm: Largest norm of the gradients; larger ones are scaled down. None never scales.
        gradient_checkpointing: Compute activations again in the backward pass. Needs less memory and more time.
        ema_decay: Decay of a running mean of the weights, which is then evaluated and saved. It rises to this value,
            as the first weights are poor. None keeps no mean.
        freeze_encoder_epochs: Epochs at the start in which the encoder does not learn.
        freeze_norms_epochs: Epochs at the start in which the batch norms of the encoder keep their weights and
            statistics. Then batches much smaller than those of the pretraining do no harm.
        evaluate_every: Epochs between evaluations. The last epoch is always evaluated.
        init_from: Checkpoint folder, Hub id or shipped network to start from, as for fine-tuning. Earlier phases are
            skipped.
        init_backbone_from: Pretrained weights for the encoder: a folder, a Hub id, or efficientnet-lite0, -lite1 or
            -lite2, which the extra `encoders` installs. Without them training does not start. Only for networks with
            a backbone, and not together with `init_from`.
        optimizer: The optimizer.
        schedule: The learning rate schedule.
    """

    epochs: int = MISSING
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    gradient_checkpointing: bool = False
    ema_decay: float | None = None
    freeze_encoder_epochs: int = 0
    freeze_norms_epochs: int = 0
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
        seed: Seed of the weights, of the order of the samples and of their random changes.
        mixed_precision: no, fp16, bf16 or auto. auto is bf16 where the device is faster in it, otherwise no; a resumed
            run keeps what it began with. None leaves it to `accelerate launch`.
        save_every: How often to save within an epoch, such as 10min, 2h or 500steps. None saves after epochs only.
        total_limit: Newest checkpoints to keep with all that resuming needs. If the newest is damaged, the run resumes
            from the one before.
        channels_last: Store weights and images channels-last, which nearly all processors convolve faster.
        sync_batch_norm: With several GPUs, normalize over the batches of all. Otherwise each process normalizes over
            its own batch, and the running statistics of the first are saved.
        compile: Compile the network by `torch.compile`. The first steps then take minutes.
        trackers: Loggers, by Accelerate's names.
        log_every: Batches between two rows of `log.jsonl` and of the trackers.
        protocol: Protocol that scores a segmentation.
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
    save_every: str | None = "10min"
    total_limit: int = 2
    channels_last: bool = True
    sync_batch_norm: bool = False
    compile: bool = False
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    log_every: int = 50
    protocol: str = "segmentation"
    best_metric: str = "iou"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply dotted overrides.

    `base: other.yaml` in the file starts from another recipe. The path is relative to the file. Mappings are merged,
    everything else is replaced. A text, such as `output_dir`, is taken as it is typed, without quotes around it. All
    other values are YAML.

    Args:
        path: YAML file.
        overrides: Changes such as `phases.segmentation.epochs=5`. They come last.

    Raises:
        UserError: If a file cannot be read, a key is unknown or missing, or a value is not allowed. The message names
            the key.
    """
    path = Path(path)
    for override in overrides:
        if not re.match(r"[^=\[\]]+=", override):
            raise UserError(f"got override {override!r}, expected key=value such as data.path=data/sirst")
    merged, texts, where = OmegaConf.structured(Recipe), {}, path
    try:
        for file, written, typed in _with_bases(path):
            where = file
            merged, texts = _merge(merged, written), texts | typed
        for written, typed in map(_parse_override, overrides):
            merged, texts = _merge(merged, written), texts | typed
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"recipe {path} lacks {', '.join(missing)}; set it there or as {missing[0]}=VALUE")
        recipe = _with_texts(OmegaConf.to_object(merged), texts)
    except OmegaConfBaseException as error:
        raise UserError(f"recipe {where}: {_describe(error)}") from error
    except (YAMLError, ValueError) as error:
        raise UserError(f"recipe {where}: {_one_line(error)}") from error
    drop_old_switches(recipe.network, recipe.model, path)
    _check(recipe, path)
    _expand_home(recipe)
    return recipe


def _merge(recipe: DictConfig, written: DictConfig) -> DictConfig:
    try:
        return OmegaConf.merge(recipe, written)
    except TypeError as error:  # of `model` and `processor`, which have no types
        keys = ", ".join(OmegaConf.to_container(written))
        raise ValueError(f"{keys}: got a list in place of keys with values, or the reverse") from error


def _expand_home(recipe: Recipe):
    """Replace a leading ~ of paths by the home folder."""
    recipe.output_dir, data = with_home(recipe.output_dir), recipe.data
    data.path = [with_home(path) for path in data.path] if isinstance(data.path, list) else with_home(data.path)
    for phase in recipe.phases.values():
        phase.init_from = phase.init_from and with_home(phase.init_from)
        phase.init_backbone_from = phase.init_backbone_from and with_home(phase.init_backbone_from)


Texts = dict[tuple[str, ...], Any]  # by their keys; data.path can be a list of them, and an optional text None
DATA_PATH = ("data", "path")
TEXT, NULL, MAPPING = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "map"))


def _parse_override(override: str) -> tuple[DictConfig, Texts]:
    """Return a change as nested keys with its value, and its texts."""
    key, _, value = override.partition("=")
    kind, parts = Recipe, tuple(key.split("."))
    for part in parts:
        kind = _kind_of(kind, part)
    if kind == str | None and value in ("", "null"):
        node = yaml.ScalarNode(NULL, "null")
    elif _is_text(kind, parts) and not (parts == DATA_PATH and value.startswith("[")):
        quoted = re.fullmatch(r"""(['"])(.*)\1""", value)  # as YAML needs it elsewhere
        node = yaml.ScalarNode(TEXT, quoted[2] if quoted else value)
    else:
        node = yaml.compose(value, yaml.SafeLoader) or yaml.ScalarNode(NULL, "null")
    for part in reversed(parts):
        node = yaml.MappingNode(MAPPING, [(yaml.ScalarNode(TEXT, part), node)])
    return _read(node)


def _kind_of(kind: Any, name: str) -> Any:
    """Return the type of a field; `model` and `processor` have none."""
    of_dict = get_args(kind)[-1] if get_origin(kind) is dict else None
    return get_type_hints(kind).get(name) if is_dataclass(kind) else of_dict


def _is_text(kind: Any, key: tuple[str, ...]) -> bool:
    return kind in (str, str | None) or key == DATA_PATH


def _read(node: yaml.Node | None) -> tuple[DictConfig, Texts]:
    """Return values without their texts, and the texts.

    YAML would read some texts as numbers or switches, and OmegaConf fills in `${...}`.
    """
    texts = {}
    written = yaml.serialize(_take_texts(node, texts), Dumper=yaml.SafeDumper, allow_unicode=True) if node else ""
    written = OmegaConf.create(written)
    drop_old_keys(written)
    return written, texts


def _take_texts(node: yaml.Node, texts: Texts, kind: Any = Recipe, key: tuple[str, ...] = ()) -> yaml.Node:
    """Copy a tree with empty texts; the texts go into `texts`."""
    if _is_text(kind, key):
        is_list = key == DATA_PATH and isinstance(node, yaml.SequenceNode)
        values = node.value if is_list else [node]
        if all(isinstance(one, yaml.ScalarNode) for one in values):
            values = [None if one.tag == NULL else one.value for one in values]
            texts[key] = values if is_list else values[0]
            return node if texts[key] is None else yaml.ScalarNode(TEXT, "", style="'")
    elif is_dataclass(kind) or get_origin(kind) is dict:
        if not isinstance(node, yaml.MappingNode):
            if node.tag == NULL:
                return node
            got = yaml.serialize(node, Dumper=yaml.SafeDumper).splitlines()[0][:100]
            raise ValueError(f"{'.'.join(key) or 'the file'}: got {got}, expected keys with values")
        pairs = []
        for name, value in node.value:
            part = str(name.value)
            pairs.append((name, _take_texts(value, texts, _kind_of(kind, part), (*key, part))))
        return yaml.MappingNode(node.tag, pairs, flow_style=node.flow_style)
    return node


def _with_texts(recipe: Any, texts: Texts) -> Any:
    """Set the texts of a recipe, or of a part of it."""
    for (*parts, name), text in texts.items():
        owner = recipe
        for part in parts:
            owner = owner[part] if isinstance(owner, dict) else getattr(owner, part)
        setattr(owner, name, text)
    return recipe


def parse_recipe(text: str) -> Recipe:
    """Return the recipe in the file of a run, unchecked.

    Defaults stand for the settings that older runs lack.
    """
    written, texts = _read(yaml.compose(text, yaml.SafeLoader))
    return _with_texts(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), written)), texts)


def dump_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


def read_data_recipe(path: Path) -> DataRecipe:
    """Read the data settings of a run's recipe.

    Unlike `load_recipe`, it accepts recipes of networks or loggers that are unknown here.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        written, texts = _read(yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader))
        data = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataRecipe), written.get("data") or {}))
        return _with_texts(data, {key[1:]: text for key, text in texts.items() if key[0] == "data"})
    except (OSError, AttributeError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"cannot read recipe {path}: {_one_line(error)}") from error


def restore_recipe(values: dict[str, Any]) -> Recipe:
    """Return the recipe on record beside a checkpoint."""
    return parse_recipe(yaml.safe_dump(values))


def drop_old_keys(written: DictConfig):
    """Drop a key of older recipes; an encoder is now always required."""
    phases = written.get("phases")
    for phase in phases.values() if isinstance(phases, DictConfig) else ():
        if isinstance(phase, DictConfig):
            phase.pop("init_backbone_required", None)


def drop_old_switches(network: str, model: dict[str, Any], path: Path):
    """Drop the switches of older recipes of RUN from `model`.

    Raises:
        UserError: If one is off.
    """
    if network == "run":
        try:
            drop_removed_switches(model)
        except ValueError as error:
            raise UserError(f"recipe {path}: model: {error}") from error


def _with_bases(path: Path, after: tuple[Path, ...] = ()) -> Iterator[tuple[Path, DictConfig, Texts]]:
    """Yield the bases of a recipe file, then its own content."""
    if path.resolve() in [one.resolve() for one in after]:
        chain = " -> ".join(map(str, (*after, path)))
        raise UserError(f"recipe {after[0]}: `base` goes in a circle, {chain}; remove one of them")
    what = f"base {path} of recipe {after[-1]}" if after else f"recipe {path}"
    if is_folder(path) or path.is_char_device():  # which may have no end
        raise UserError(f"{what} is a {'folder' if is_folder(path) else 'device'}, expected a YAML file; add its name")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        if node and not isinstance(node, yaml.MappingNode) and node.tag != NULL:
            got = "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value)[:100]
            raise UserError(f"{what} is {got}, expected key: value lines")
        written, texts = _read(node)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what}: {getattr(error, 'strerror', None) or error}") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{what} is not valid YAML: {_one_line(error)}") from error
    except ValueError as error:
        raise UserError(f"{what}: {_one_line(error)}") from error
    if "base" in written:
        base = written.pop("base")
        if not isinstance(base, str) or not base.strip():
            raise UserError(f"recipe {path}: base is {base!r}, expected the path of another recipe")
        yield from _with_bases(path.parent / with_home(base), (*after, path))
    yield path, written, texts


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dictionaries by dotted keys."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


_ABOVE_0 = ("epochs", "batch_size", "gradient_accumulation_steps", "max_grad_norm", "evaluate_every", "learning_rate")
_ABOVE_0 += ("power", "min_zoom", "max_zoom", "max_pastes", "log_every", "shuffle_buffer")
_FROM_0 = ("num_workers", "weight_decay", "momentum", "warmup_steps")
_FROM_0 += ("brightness", "contrast", "saturation", "sharpness", "encoder_lr_ratio", "freeze_encoder_epochs")
_FROM_0 += ("freeze_norms_epochs", "max_blur", "noise")
_SHARES = [field.name for field in dataclasses.fields(TransformRecipe) if field.name.endswith("_probability")]
# What messages expect, the check, and the names of the numbers.
_LIMITS = (
    ("more than 0", lambda value: 0 < value < math.inf, _ABOVE_0),
    ("0 or more", lambda value: 0 <= value < math.inf, _FROM_0),
    ("from 0 to below 2^32", lambda value: 0 <= value < 2**32, ["seed", "split_seed"]),
    ("from 0 to 1", lambda value: 0 <= value <= 1, _SHARES),
    ("from 1 to 100", lambda value: 1 <= value <= MOST_CHECKPOINTS, ["total_limit"]),
    ("between 0 and 1", lambda value: 0 < value < 1, ["ema_decay"]),
    ("from 0 to below 1", lambda value: 0 <= value < 1, ["max_crop_ratio", "max_unreadable"]),
    ("1 or more", lambda value: 1 <= value < math.inf, ["max_stretch"]),
    ("from 0 to 0.5", lambda value: 0 <= value <= 0.5, ["hue"]),
    ("from 0 to 180 degrees", lambda value: 0 <= value <= 180, ["max_rotation"]),
)


def _check(recipe: Recipe, path: Path):
    """Reject values that have the right type but cannot be used."""

    def refuse(key: str, got: Any, expected: str):
        raise UserError(f"recipe {path}: {key} is {got!r}, expected {expected}")

    def one_of(key: str, value: Any, allowed: Iterable, which: str = ""):
        if value not in allowed:
            refuse(key, value, f"one of {', '.join(map(str, allowed))}{which}")

    one_of("network", recipe.network, NETWORKS)
    if recipe.data.eval_split == recipe.data.train_split:
        refuse("data.eval_split", recipe.data.eval_split, "another split than data.train_split")
    network = NETWORKS[recipe.network]
    known = {field.name for field in dataclasses.fields(network.config_class)}
    for name in sorted(recipe.model.keys() - known):
        refuse("model", name, "a field of the network's configuration")
    for name in sorted(recipe.processor.keys() - set(UnconcealImageProcessor.valid_kwargs.__annotations__)):
        refuse("processor", name, "a field of the network's processor")
    backbone = recipe.model.get("backbone_config")
    if isinstance(backbone, dict) and backbone.get("model_type") in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[backbone["model_type"]]
        known = {field.name.removeprefix("_") for field in dataclasses.fields(config_class)}
        for name in sorted(backbone.keys() - known - set(config_class.attribute_map) - {"model_type"}):
            refuse("model.backbone_config", name, f"a field of the configuration of {backbone['model_type']}")

    if not recipe.phases:
        refuse("phases", {}, f"at least one of {', '.join(network.tasks)}")
    for task, phase in recipe.phases.items():
        key = f"phases.{task}"
        if task not in network.tasks:
            refuse("phases", task, f"only {', '.join(network.tasks)}")
        one_of(f"{key}.optimizer.name", phase.optimizer.name, ("sgd", "adam", "adamw"))
        one_of(f"{key}.schedule.name", phase.schedule.name, ("polynomial", "cosine", "constant"))
        if phase.init_backbone_from and phase.init_from:
            refuse(f"{key}.init_backbone_from", phase.init_backbone_from, "null together with init_from")
        if not network.tasks[task].has_backbone:
            ratio = phase.optimizer.encoder_lr_ratio
            for name, value, default in (
                ("init_backbone_from", phase.init_backbone_from, None),
                ("freeze_encoder_epochs", phase.freeze_encoder_epochs, 0),
                ("freeze_norms_epochs", phase.freeze_norms_epochs, 0),
                ("optimizer.encoder_lr_ratio", ratio, 1),
            ):
                if value != default:
                    default = "null" if default is None else default
                    refuse(f"{key}.{name}", value, f"{default}, as {recipe.network} has no backbone")

    if not recipe.output_dir.strip():
        refuse("output_dir", recipe.output_dir, "a folder")
    one_of("mixed_precision", recipe.mixed_precision, (None, "no", "fp16", "bf16", "auto"))
    one_of("protocol", recipe.protocol, PROTOCOLS)
    best_metrics = PROTOCOLS[recipe.protocol].best_metrics
    one_of("best_metric", recipe.best_metric, best_metrics, f" (protocol {recipe.protocol})")
    trackers = sorted(tracker.value for tracker in get_available_trackers())
    for tracker in recipe.trackers:
        if tracker not in trackers:
            refuse("trackers", tracker, f"one that is installed: {', '.join(trackers)}")

    data, paths = recipe.data, recipe.data.paths
    if not paths or not all(isinstance(one, str) and one.strip() for one in paths):
        refuse("data.path", data.path, "a folder, the id of a data set on the Hub, or a list of them")
    if data.streaming:
        for key, value, expected in (
            ("path", data.path if len(paths) > 1 else None, "one data set"),
            ("weights", data.weights, "null"),
            ("split_seed", data.split_seed, "null"),
            ("transforms.paste_probability", data.transforms.paste_probability or None, "0"),
        ):
            if value is not None:
                refuse(f"data.{key}", value, f"{expected} with data.streaming")
    if len(set(paths)) < len(paths):
        refuse("data.path", data.path, "different data sets; set data.weights to see one more often")
    if data.weights is not None and not (
        len(data.weights) == len(paths) and all(0 < weight < math.inf for weight in data.weights)
    ):
        refuse("data.weights", data.weights, f"a number above 0 for each of {len(paths)} data sets")
    for key, value in flatten({**dataclasses.asdict(recipe), "model": None, "processor": None}).items():
        for expected, is_allowed, names in _LIMITS:
            if key.rpartition(".")[2] in names and value is not None and not is_allowed(value):
                refuse(key, value, expected)
    if recipe.save_every is not None:
        try:
            parse_interval(recipe.save_every)
        except ValueError as error:
            refuse("save_every", recipe.save_every, str(error))
    transforms = recipe.data.transforms
    if transforms.min_zoom > transforms.max_zoom:
        refuse("data.transforms.min_zoom", transforms.min_zoom, f"at most max_zoom, {transforms.max_zoom}")
    crop_size = transforms.crop_size
    smallest = max(model_class.min_image_size for model_class in network.tasks.values())
    if crop_size is not None and crop_size < smallest:
        refuse("data.transforms.crop_size", crop_size, f"at least {smallest}")


def _describe(error: OmegaConfBaseException) -> str:
    """Name the key and what was expected."""
    key = getattr(error, "full_key", None)
    message = _one_line(error)
    if message.startswith("Key '") and "not in" in message:
        fields = [field.name for field in dataclasses.fields(error.object_type)] if error.object_type else []
        return f"unknown key {key}; expected one of {', '.join(fields)}"
    return f"{key}: {message}" if key else message


def _one_line(error: Exception) -> str:
    """Return the message without the types that omegaconf appends."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if not line.startswith(("full_key", "object_type", "reference_type")))
