"""What a push sends: checked, completed and listed, before anything leaves this machine."""

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from huggingface_hub import DatasetCard, RepoCard, eval_result_entries_to_yaml

from .. import models
from ..api import load, weights_digest
from ..data.write import FEATURES
from ..evaluation.protocols import PROTOCOLS
from ..evaluation.tables import Result, read_result
from ..training.checkpoints import read_progress
from ..training.loop import RECORD
from ..training.recipe import Recipe, load_recipe
from ..utils.errors import UserError, one_line
from ..utils.files import is_folder
from .cards import (
    Training,
    make_model_card,
    network_name,
    read_data_card,
    section,
    split_counts,
    without_folders,
)
from .metric_space import write_metric_space
from .push import CARD, Upload, check_repo_id


EVAL_RESULTS = ".eval_results/unconceal.yaml"
UNSTATED_LICENSES = ("other", "unknown")
# Those under which anybody may publish a copy, some of them not for profit; what is not here needs the caller's word.
OPEN_LICENSES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "unlicense", "cc0-1.0", "pddl", "odbl", "odc-by"),
    *(
        "cc-by-2.0",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
    ),
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
)
LEFT_OUT = {"__pycache__", "node_modules", "Thumbs.db"}


def stage_model(
    source: str | Path,
    repo_id: str,
    folder: Path,
    *,
    recipe: str | Path | None = None,
    results: Sequence[str | Path] = (),
    license: str | None = None,
    card: str | Path | None = None,
) -> Upload:
    """Write weights, code, processor, pipeline and card of a segmentation network into an empty folder.

    The network is loaded and saved anew, so weights are whole and safetensors, and the code is this version's.

    Args:
        source: Checkpoint folder.
        repo_id: Where it goes; the card names it.
        folder: Empty folder for the files.
        recipe: Of its training; by default that of the run which the checkpoint lies in, if there is one.
        results: Of its evaluation, files or folders that `scripts/evaluate.py --out` wrote.
        license: Of the weights, an identifier of the Hub's list.
        card: A card to send in place of the generated one.

    Raises:
        UserError: If the checkpoint cannot be loaded, or if recipe, results or card are not of it or cannot be read.
    """
    check_repo_id(repo_id)
    source = Path(source)
    if not is_folder(source):
        raise UserError(f"got {source} as the model, which is no folder; give the folder of a checkpoint")
    segmenter = load(source, device="cpu")
    training = _read_training(source, recipe, network_name(segmenter.model.config))
    read = [read_result(path) for path in results]
    if read:
        _check_same_model(read, source, weights_digest(segmenter.model))
    config = segmenter.model.config
    for part in filter(None, (getattr(config, name, None) for name in config.sub_configs)):
        part._name_or_path = ""  # a folder of this machine
    segmenter.model.save_pretrained(folder)
    segmenter.processor.save_pretrained(folder)
    text, rows = make_model_card(segmenter, repo_id, training, read, license)
    if card is not None:
        text = _read_text(card)
    _check_header(text, card or "the generated card")
    (folder / CARD).write_text(text, encoding="utf-8")
    if rows:
        (folder / EVAL_RESULTS).parent.mkdir()
        entries = yaml.safe_dump(eval_result_entries_to_yaml(rows), sort_keys=False)
        (folder / EVAL_RESULTS).write_text(entries, encoding="utf-8")
    # Weights of an earlier push in another number of shards or another format would be loaded in place of these.
    code = tuple(path.name for path in Path(models.__file__).parent.glob("*.py"))
    weights = (
        "model*.safetensors",
        "model.safetensors.index.json",
        "pytorch_model*.bin",
        "pytorch_model.bin.index.json",
    )
    return Upload(repo_id, "model", _list_files(folder), (*weights, *code, EVAL_RESULTS))


def _read_training(source: Path, given: str | Path | None, network: str) -> Training | None:
    # A run is RUN/recipe.yaml and RUN/TASK/{best,last}.
    source = source.absolute()
    path = Path(given) if given else source.parent.parent / RECORD
    if not given and not path.is_file():
        return None
    recipe: Recipe = load_recipe(path)
    if recipe.network != network:
        raise UserError(
            f"{path} is a recipe of {recipe.network}, but {source} holds a {network}; give its own by --recipe"
        )
    task = source.parent.name
    return Training(
        recipe=recipe,
        task=task if task in recipe.phases else list(recipe.phases)[-1],
        progress=read_progress(source),
        data_card=read_data_card(recipe.data.path),
    )


def _check_same_model(results: Sequence[Result], source: Path, digest: str):
    """Refuse to publish the numbers of another model, of mask files, or of a part of a split."""
    for result in results:
        if result.weights != digest:
            raise UserError(
                f"{result.path} holds no results of the weights in {source}; evaluate these by scripts/evaluate.py --model, "
                "or leave it out"
            )
        if result.limit:
            raise UserError(f"{result.path} is of the first {result.limit} images only; evaluate without --limit")


def stage_dataset(
    source: str | Path,
    repo_id: str,
    folder: Path,
    *,
    license: str | None = None,
    may_redistribute: bool = False,
) -> Upload:
    """List the files of a data set that scripts/prepare_data.py made, under a card that says who may have it.

    Args:
        source: Its folder.
        repo_id: Where it goes.
        folder: Empty folder for the card.
        license: Licence of the data, in place of the one on its card.
        may_redistribute: Whether the caller states that the makers allow a copy to be published.

    Raises:
        UserError: If it is no such data set or is damaged, or if its terms do not allow a copy and the caller does not
            state that they do.
    """
    check_repo_id(repo_id)
    source = Path(source)
    if not is_folder(source):
        raise UserError(f"got {source} as the data set, which is no folder; give one that prepare_data.py made")
    card = read_data_card(source)
    shards = sorted((source / "data").glob("*.parquet"))
    if card is None or not shards:
        raise UserError(f"{source} has no {CARD} or no data/*.parquet; give a folder that prepare_data.py made")
    _check_shards(card, shards)
    stated = card.data.license
    if license and stated not in (None, *UNSTATED_LICENSES, license):
        raise UserError(f"the card of {source} states the licence {stated}; change it there, if its makers have")
    card.data.license = license or stated
    terms = section(card, "Terms") or "none are on its card"
    if card.data.license not in OPEN_LICENSES and not may_redistribute:
        raise UserError(
            f"the card of {source} names no licence under which a copy may be published (it says {card.data.license}; terms: "
            f"{' '.join(terms.split())}); ask its makers, then state what they allow by --license ID or --may-redistribute"
        )
    text = without_folders(str(card))
    if stated not in OPEN_LICENSES:
        said = f"the licence `{license}`" if license else "that the makers allow it"
        text = f"{text.rstrip()}\n\n## This copy\n\nWhoever published it states {said}.\n"
    _check_header(text, source / CARD)
    (folder / CARD).write_text(text, encoding="utf-8")
    files = {CARD: folder / CARD, **{f"data/{path.name}": path for path in shards}}
    return Upload(repo_id, "dataset", files, replaces=("data/*.parquet",))


def _check_shards(card: DatasetCard, shards: Sequence[Path]):
    """Refuse files that cannot be read or that are not those which the card counts."""
    counted = split_counts(card)
    if not counted:
        raise UserError("the data set's card has no counts (dataset_info); prepare the data set again")
    found = dict.fromkeys(counted, 0)
    for path in shards:
        try:
            held = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read {path}: {one_line(error)}; prepare the data set again") from None
        missing = set(FEATURES) - set(held.schema_arrow.names)
        if missing:
            raise UserError(f"{path} lacks the column {min(missing)}; expected {', '.join(FEATURES)}")
        split = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
        found[split] = found.get(split, 0) + held.metadata.num_rows
    if found != counted:
        raise UserError(f"the card counts {counted}, but the files hold {found}; prepare the data set again")


def stage_metric(source: str | Path, repo_id: str, folder: Path) -> Upload:
    """Write a protocol as the files of a Space which `evaluate.load(repo_id)` opens.

    Args:
        source: Name of a protocol.
        repo_id: Where it goes; its last part needs a hyphen.
        folder: Empty folder for the files.

    Raises:
        UserError: If there is no such protocol, or if the name cannot be that of a Space.
    """
    check_repo_id(repo_id)
    if str(source) not in PROTOCOLS:
        raise UserError(f"got the metric {source}, expected a protocol: {', '.join(PROTOCOLS)}")
    owner, name = repo_id.split("/")
    space = folder / name
    write_metric_space(str(source), space, owner=owner)
    return Upload(repo_id, "space", _list_files(space), replaces=("protocol_*.py",), sdk="gradio")


def stage_space(source: str | Path, repo_id: str) -> Upload:
    """List the files of a Space's folder.

    Args:
        source: The folder, with `README.md` and the app that its header names.
        repo_id: Where it goes.

    Raises:
        UserError: If it is no folder of a Space.
    """
    check_repo_id(repo_id)
    source = Path(source)
    card = source / CARD
    if not card.is_file():
        raise UserError(f"{source} has no {CARD}; expected the folder of a Space, such as space")
    header = _check_header(_read_text(card), card)
    if not header.get("sdk"):
        raise UserError(f"the header of {card} names no sdk; expected that of a Space, such as sdk: gradio")
    usual = {"docker": "Dockerfile", "static": "index.html"}.get(header["sdk"], "app.py")
    app = header.get("app_file", usual)
    if not (source / app).is_file():
        raise UserError(f"{source} has no {app}; a Space of the sdk {header['sdk']} needs it, or another app_file")
    return Upload(repo_id, "space", _list_files(source), sdk=header["sdk"])


def _list_files(folder: Path) -> dict[str, Path]:
    """Every file by its path in the repository, but for hidden ones, such as .env and .git, and what tools leave behind.

    Raises:
        UserError: If one is a link to somewhere outside.
    """
    files = {}
    for path in sorted(folder.rglob("*")):  # which does not follow links to folders
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if (
            not path.is_file()
            or (hidden and name not in (".gitattributes", EVAL_RESULTS))
            or LEFT_OUT & set(path.parts)
        ):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} is a link out of {folder}; put the file itself there, or remove it")
        files[name] = path
    return files


def _check_header(text: str, name: str | Path) -> dict:
    """Return the header of a card.

    Raises:
        UserError: If it has none, or if it is no YAML.
    """
    try:
        header = RepoCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"the header of {name} is damaged: {one_line(error)}") from None
    if not header:
        raise UserError(f"{name} has no header; expected YAML between lines of ---")
    return header


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
