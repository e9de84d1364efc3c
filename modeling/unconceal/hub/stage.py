"""Check, complete and list the files of a push."""

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from huggingface_hub import DatasetCard, RepoCard
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from .. import models
from ..api import Segmenter, load, weights_digest
from ..data.cards import describe_set, read_data_card, section, split_counts
from ..data.write import FEATURES
from ..evaluation.tables import Result, read_result
from ..models.networks import NETWORKS
from ..training.checkpoints import PROGRESS_FILE, RECIPE_FILE, Conversion, read_progress, read_record, trained_on
from ..training.recipe import load_recipe
from ..utils.errors import UserError, one_line
from ..utils.files import is_folder
from ..utils.loading_errors import loading_explained
from ..utils.signatures import sign
from . import shipped
from .card_on_hub import CARD, kept_license, with_kept_results
from .cards import Training, from_record, make_model_card, use_on_hub, without_folders
from .exported import refuse_exported
from .push import Upload


logger = logging.getLogger(__name__)

# An earlier push may have left these. Its weights, in other shards or another format, would be loaded instead of ours.
STALE = (
    ".eval_results/unconceal.yaml",  # results, which need a benchmark of the Hub
    *("model*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
CODE = {path.name for path in Path(models.__file__).parent.glob("*.py")} | {"foreground.py", "mscan.py"}
UNSTATED_LICENSES = ("other", "unknown")
# Licenses under which anybody may publish a copy, some of them for non-commercial use only. For any other license, the
# caller must state that copies are allowed.
OPEN_LICENSES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "unlicense", "cc0-1.0", "pddl", "odbl", "odc-by"),
    *("cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    *("cdla-permissive-1.0", "cdla-permissive-2.0"),
)
LEFT_OUT = {"__pycache__", "node_modules", "Thumbs.db"}


def stage_model(
    source: str | Path,
    repo_id: str,
    folder: Path,
    results: Sequence[str | Path] = (),
    license: str | None = None,
    card: str | None = None,
    present: str | None = None,
) -> Upload:
    """Write weights, code, processor, pipeline and card of a network.

    The network is loaded and saved again. So the weights are complete safetensors, and the code is this version's.

    `source` is a checkpoint, or the name of a shipped network. That one keeps its card and its weights. `folder` is an
    empty folder.
    `results` are files or folders that `unconceal evaluate --out` wrote for this model. `license` is an identifier of
    the Hub's list. `card` replaces the generated one. `present` is the card in the repository: the generated one keeps
    its license, and its results if they are of these weights.

    Raises:
        UserError: If a file cannot be read, results belong to another model, or people edited the card in the
            repository.
    """
    source = Path(shipped.resolve(source))
    if not is_folder(source):
        raise UserError(f"got {source} as the model, which is not a folder; name the folder of a checkpoint")
    refuse_exported(source, "unconceal push")
    _refuse_others(source)
    kept = kept_license(present, repo_id) if card is None else None
    if source.resolve().parent == shipped.FOLDER.resolve():
        if results or license:
            what = f"got --results or --license for {source.name}, a shipped network with its own card"
            raise UserError(f"{what}; leave them out, or send another card with --card")
        return _stage_shipped(source, repo_id, folder, card, kept)
    segmenter = load(source, device="cpu")
    origin = read_origin(source, segmenter.model)
    read = check_results(results, segmenter.model, source)
    save_without_paths(segmenter, folder)
    weights = weights_digest(segmenter.model)
    if card is None:
        text = make_model_card(segmenter, repo_id, origin, read, license or kept)
        text = text if read else with_kept_results(text, present, weights)
    else:
        text = _read_text(card)
    _check_header(text, card or "the generated card")
    (folder / CARD).write_text(sign(text, weights) if card is None else text, encoding="utf-8")
    return Upload(repo_id, "model", _list_files(folder), (*STALE, *sorted(CODE)))


def save_without_paths(segmenter: Segmenter, folder: Path):
    """Save network and processor without the path of its encoder."""
    config = segmenter.model.config
    for part in filter(None, (getattr(config, name, None) for name in config.sub_configs)):
        part._name_or_path = ""
    segmenter.model.save_pretrained(folder)
    segmenter.processor.save_pretrained(folder)


def check_results(paths: Sequence[str | Path], model: PreTrainedModel, source: Path) -> list[Result]:
    """Read results; refuse those of other weights than `source` holds."""
    read = [read_result(path) for path in paths]
    digest, record = weights_digest(model) if read else None, read_record(source)
    for result in read:
        if result.weights != digest:
            advice = "evaluate them with `unconceal evaluate --model`, or leave it out"
            raise UserError(f"{result.path} holds no results of the weights in {source}; {advice}")
        if result.data and (seen := trained_on(record, result.data, result.split, result.split_seed)):
            raise UserError(f"{result.path} tells nothing of new images: {seen}; evaluate another split")
        if result.limit:
            raise UserError(f"{result.path} covers only the first {result.limit} images; evaluate without --limit")
    return read


def _refuse_others(source: Path):
    """Refuse networks that do not segment; cards and pipelines would not fit."""
    if (source / CONFIG_NAME).is_file():
        with loading_explained(f"cannot read {source / CONFIG_NAME}"):
            saved_as = (PreTrainedConfig.get_config_dict(source)[0].get("architectures") or [None])[0]
        expected = [network.tasks["segmentation"].__name__ for network in NETWORKS.values()]
        if saved_as and saved_as not in expected:
            advice = f"send it by `{saved_as}.push_to_hub`, which writes no card"
            raise UserError(f"got {source}, which holds {saved_as}, expected one of {', '.join(expected)}; {advice}")


def _stage_shipped(source: Path, repo_id: str, folder: Path, card: str | None, kept: str | None) -> Upload:
    """Add code to a shipped network, and another use to its card."""
    save_without_paths(load(source, device="cpu"), folder)
    for path in (source / shipped.WEIGHTS, *source.glob("*.webp")):
        shutil.copy(path, folder)  # weights in float16, whose SHA-256 is on the card
    text = _read_text(card or source / CARD)
    if card is None:
        use = f"## Use\n\n{use_on_hub(repo_id)}\n\n"
        text = re.sub(r"^## Use\n.*?(?=^## )", lambda _: use, text, count=1, flags=re.MULTILINE | re.DOTALL)
    license = _check_header(text, card or source / CARD).get("license")
    if kept not in (None, license):
        what = f"the card of {repo_id} states the license {kept}, but {source.name} has {license}"
        raise UserError(f"{what}; remove {CARD} there, or send another card with --card")
    (folder / CARD).write_text(sign(text) if card is None else text, encoding="utf-8")
    return Upload(repo_id, "model", _list_files(folder), (*STALE, *sorted(CODE)))


def read_origin(source: Path, model: PreTrainedModel) -> Training | Conversion | None:
    """Return the record of the weights in a folder, or None.

    A record that was made beside other weights does not count. Of older runs, whose records are shorter, the recipe
    is RUN/recipe.yaml, and the data sets are those that it names.
    """
    record = read_record(source)
    if record is None or record.get("weights") not in (None, weights_digest(model)):
        return None
    recipe = source.absolute().parent.parent / RECIPE_FILE
    if (source / PROGRESS_FILE).is_file() and not record.get("recipe") and recipe.is_file():
        recipe = load_recipe(recipe)
        sets = [(path, read_data_card(path)) for path in recipe.data.paths]
        data = [describe_set(path, {}) | {"images": split_counts(card) if card else {}} for path, card in sets]
        record = {**record, "recipe": asdict(recipe), "data": data}
    return from_record(record, read_progress(source.with_name("last")))


def stage_dataset(
    source: str | Path,
    repo_id: str,
    folder: Path,
    license: str | None = None,
    may_redistribute: bool = False,
    present: str | None = None,
) -> Upload:
    """List the files of a data set, its license on the card.

    `source` is a folder that `unconceal prepare` made, `folder` an empty one for the card. `license` is for a card
    without one. With `may_redistribute` the caller states that the makers allow copies. `present` is the card in the
    repository, whose license holds if no other is stated.

    Raises:
        UserError: If it is not such a data set, is damaged, or has no open license and the caller states nothing.
            Also if people edited the card in the repository.
    """
    source = Path(source)
    if not is_folder(source):
        raise UserError(f"got {source} as the data set, which is not a folder; name one that `unconceal prepare` made")
    card = read_data_card(source)
    shards = sorted((source / "data").glob("*.parquet"))
    if card is None or not shards:
        raise UserError(f"{source} has no {CARD} or no data/*.parquet; name a folder that `unconceal prepare` made")
    _check_shards(card, shards)
    stated, kept = card.data.license, kept_license(present, repo_id)
    if not license and stated in (None, *UNSTATED_LICENSES) and kept not in UNSTATED_LICENSES:
        license = kept
    if license and stated not in (None, *UNSTATED_LICENSES, license):
        what = f"got --license {license}, but the card of {source} states {stated}"
        raise UserError(f"{what}; if that is wrong, correct the card")
    card.data.license = license or stated
    if card.data.license not in OPEN_LICENSES and not may_redistribute:
        terms = " ".join((section(card, "Terms") or "none are on its card").split())
        said = f"it says {card.data.license}; terms: {terms}"
        advice = "ask its makers, then state what they allow with --license ID or --may-redistribute"
        raise UserError(f"the card of {source} names no license that allows copies ({said}); {advice}")
    text = without_folders(str(card))
    if stated not in OPEN_LICENSES:
        said = f"the license `{license}`" if license else "that the makers allow it"
        text = f"{text.rstrip()}\n\n## This copy\n\nThe publisher of this copy states {said}.\n"
    _check_header(text, source / CARD)
    (folder / CARD).write_text(sign(text), encoding="utf-8")
    files = {CARD: folder / CARD, **{f"data/{path.name}": path for path in shards}}
    held = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    if left := sorted(name for name in held - files.keys() if "/." not in f"/{name}"):
        what = "%d other files in %s are not sent, such as %s; add them on the Hub"
        logger.warning(what, len(left), source, left[0])
    return Upload(repo_id, "dataset", files, replaces=("data/*.parquet",))


def _check_shards(card: DatasetCard, shards: Sequence[Path]):
    """Refuse unreadable files, and counts unlike those on the card."""
    counted = split_counts(card)
    if not counted:
        raise UserError("the data set's card has no counts (dataset_info); prepare the data set again")
    found = dict.fromkeys(counted, 0)
    for path in shards:
        try:
            held = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read {path}: {one_line(error)}; prepare the data set again") from error
        missing = set(FEATURES) - set(held.schema_arrow.names)
        if missing:
            what = f"lacks the column {min(missing)}, expected {', '.join(FEATURES)}"
            raise UserError(f"{path} {what}; prepare the data set again")
        split = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
        found[split] = found.get(split, 0) + held.metadata.num_rows
    if found != counted:
        raise UserError(f"the card counts {counted}, but the files hold {found}; prepare the data set again")


def stage_space(source: str | Path, repo_id: str) -> Upload:
    """List the files of a Space's folder, or raise a `UserError`."""
    source = Path(source)
    card = source / CARD
    if not card.is_file():
        raise UserError(f"got {source}, which has no {CARD}; name the folder of a Space, such as space")
    header = _check_header(_read_text(card), card)
    if not header.get("sdk"):
        raise UserError(f"the header of {card} names no sdk; add one, such as sdk: gradio")
    app = header.get("app_file") or {"docker": "Dockerfile", "static": "index.html"}.get(header["sdk"], "app.py")
    if not (source / app).is_file():
        what = f"{source} has no {app}, which the sdk {header['sdk']} needs"
        raise UserError(f"{what}; add it, or name another app_file")
    return Upload(repo_id, "space", _list_files(source), sdk=header["sdk"])


def _list_files(folder: Path) -> dict[str, Path]:
    """Return path in the repository -> file, without hidden files and leftovers."""
    files = {}
    for path in sorted(folder.rglob("*")):  # does not follow links to folders
        name = path.relative_to(folder).as_posix()
        is_hidden = "/." in f"/{name}" and name != ".gitattributes"
        if is_hidden or not path.is_file() or LEFT_OUT & set(path.parts):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} is a link that leaves {folder}; put the file itself there, or remove it")
        files[name] = path
    return files


def _check_header(text: str, name: str | Path) -> dict:
    """Return the header of a card, or refuse the card."""
    try:
        header = RepoCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the header of {name}: {one_line(error)}; correct it") from error
    if not header:
        raise UserError(f"{name} has no header; begin it with YAML between two lines of ---")
    return header


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
