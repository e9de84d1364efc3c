"""What a push sends: checked, completed and listed, before anything leaves this machine."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from huggingface_hub import DatasetCard, RepoCard, eval_result_entries_to_yaml

from ..data.write import FEATURES
from ..errors import UserError, one_line
from ..files import is_folder
from ..inference import load
from ..metrics.protocols import PROTOCOLS
from ..metrics.tables import Result, read_result
from ..training.checkpoints import read_progress
from ..training.loop import RECORD
from ..training.recipe import Recipe, load_recipe
from .cards import Training, make_model_card, read_data_card, section
from .metric_space import write_metric_space
from .push import Upload, check_repo_id


CARD = "README.md"
EVAL_RESULTS = ".eval_results/unconceal.yaml"
# Their terms are the makers' own, or nobody has stated any.
UNCLEAR_LICENSES = (None, "other", "unknown")
LEFT_OUT = ("__pycache__", "node_modules")


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
    training = _read_training(source, recipe)
    read = [read_result(path) for path in results]
    for result in read:
        _check_same_model(result, source, repo_id)
    segmenter.model.save_pretrained(folder)
    segmenter.processor.save_pretrained(folder)
    made = make_model_card(segmenter, repo_id, training, read, license)
    text = made.text if card is None else _read_text(card)
    _check_header(text, card or "the generated card")
    (folder / CARD).write_text(text, encoding="utf-8")
    if made.eval_results:
        (folder / EVAL_RESULTS).parent.mkdir()
        entries = yaml.safe_dump(eval_result_entries_to_yaml(made.eval_results), sort_keys=False)
        (folder / EVAL_RESULTS).write_text(entries, encoding="utf-8")
    # Weights of an earlier push in another number of shards or another format would be loaded in place of these.
    replaces = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py", ".eval_results/*")
    return Upload(repo_id, "model", _list_files(folder), replaces)


def _read_training(source: Path, given: str | Path | None) -> Training | None:
    # A run is RUN/recipe.yaml and RUN/TASK/{best,last}.
    source = source.absolute()
    run = source.parents[1]
    path = Path(given) if given else run / RECORD
    if not given and not path.is_file():
        return None
    recipe: Recipe = load_recipe(path)
    task = source.parent.name
    return Training(
        recipe=recipe,
        task=task if task in recipe.phases else list(recipe.phases)[-1],
        progress=read_progress(source),
        data_card=read_data_card(recipe.data.path),
    )


def _check_same_model(result: Result, source: Path, repo_id: str):
    """Refuse to publish the numbers of another model."""
    scored = result.model
    if scored != repo_id and (scored is None or Path(scored).resolve() != source.resolve()):
        raise UserError(
            f"{result.path} holds the results of {scored or 'mask files'}, not of {source}; evaluate this model, or leave "
            "them out"
        )


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
    if license:
        card.data.license = license
    terms = section(card, "Terms") or "none are on its card"
    if card.data.license in UNCLEAR_LICENSES and not may_redistribute:
        raise UserError(
            f"the card of {source} names no licence under which a copy may be published (terms: {' '.join(terms.split())}); "
            "ask its makers, then state what they allow by --license ID or --may-redistribute"
        )
    text = str(card)
    if card.data.license in UNCLEAR_LICENSES:
        text = f"{text.rstrip()}\n\n## This copy\n\nWhoever published it states that the makers allow it.\n"
    _check_header(text, source / CARD)
    (folder / CARD).write_text(text, encoding="utf-8")
    files = {CARD: folder / CARD, **{f"data/{path.name}": path for path in shards}}
    return Upload(repo_id, "dataset", files, replaces=("data/*.parquet",))


def _check_shards(card: DatasetCard, shards: Sequence[Path]):
    """Refuse files that cannot be read or that are not those which the card counts."""
    counted = {
        split["name"]: split["num_examples"]
        for split in (card.data.to_dict().get("dataset_info") or {}).get("splits", ())
    }
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
    return Upload(repo_id, "space", _list_files(space), replaces=("*.py",), sdk="gradio")


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
    app = header.get("app_file", "app.py")
    if header["sdk"] != "docker" and not (source / app).is_file():
        raise UserError(f"{source} has no {app}, which the header of its {CARD} names as the app")
    return Upload(repo_id, "space", _list_files(source), replaces=("*.py",), sdk=header["sdk"])


def _list_files(folder: Path) -> dict[str, Path]:
    """Every file by its path in the repository, but for what tools leave behind."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(_walk(folder))
        if path.is_file() and path.name not in (".DS_Store", "Thumbs.db")
    }


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            # Hidden folders are somebody's tools: .git, .venv, .cache. The Hub's own comes from here.
            if path.name not in LEFT_OUT and (not path.name.startswith(".") or path.name == ".eval_results"):
                yield from _walk(path)
        else:
            yield path


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
