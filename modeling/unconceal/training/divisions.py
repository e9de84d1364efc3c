"""A recipe over several random divisions of a data set, as papers on small sets report it: mean and deviation."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset, Image, concatenate_datasets

from ..data.loading import load_splits
from ..data.pairs import Pair, split_at_random
from ..data.write import Card, make_row, new_data_set, write_card, write_splits
from ..evaluation.report import RESULTS
from ..utils.errors import UserError
from ..utils.files import make_folder, replacing
from .recipe import Recipe, recipe_to_dict


RECORD = "divisions.json"


def run_divisions(
    recipe_path: str | Path,
    recipe: Recipe,
    overrides: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    train: Sequence[str],
    evaluate: Sequence[str],
    name: str,
    checkpoint: str = "best",
) -> list[Path]:
    """Divide the recipe's data set anew by each seed, train and evaluate; return the folders of the results.

    The seed also is that of the training. What is finished in `out` is kept, so a run that was stopped can be repeated;
    `out` remembers recipe, checkpoint and name, and takes no others.

    Args:
        recipe_path: YAML file of the recipe.
        recipe: What is in it, with the overrides.
        overrides: Dotted changes.
        seeds: One division each.
        out: Gets a folder `division-SEED` with `data`, `run` and `results` for each.
        train: Command of scripts/train.py.
        evaluate: Command of scripts/evaluate.py.
        name: What tables call the results.
        checkpoint: Of the segmentation, "best" or "last". Where the split that chooses the best epoch is the one that is
            reported, as in SRS's paper, "best" flatters.

    Raises:
        UserError: If the data set cannot be divided, or a training or an evaluation fails.
    """
    data, folders = recipe.data, []
    load_splits(data.path, [data.train_split, data.eval_split])  # a mistake there is not worth remembering
    wanted = {"recipe": recipe_to_dict(recipe), "checkpoint": checkpoint, "name": name}
    del wanted["recipe"]["output_dir"], wanted["recipe"]["seed"]
    record = make_folder(out) / RECORD
    if record.exists():
        kept = json.loads(record.read_text(encoding="utf-8"))
        changed = [key for key in wanted if kept.get(key) != wanted[key]]
        if changed:
            raise UserError(
                f"{out} holds divisions of another {' and '.join(changed)}; repeat that command, or choose another --out"
            )
    else:
        with replacing(record) as beside:
            beside.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    for seed in dict.fromkeys(seeds):
        folder = make_folder(Path(out) / f"division-{seed}")
        divided, run, results = folder / "data", folder / "run", folder / "results"
        if not divided.exists():
            divide(data.path, data.train_split, data.eval_split, seed, divided)
        changes = {"data.path": str(divided), "output_dir": str(run), "seed": seed}
        settings = [*overrides, *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items())]
        if not (results / RESULTS).exists():
            _call([*train, str(recipe_path), "--resume", *settings], f"the training of division {seed}")
            command = [*evaluate, "--model", str(run / "segmentation" / checkpoint), "--data", str(divided)]
            command += ["--split", data.eval_split, "--protocol", recipe.protocol, "--name", name]
            command += ["--division-seed", str(seed), "--out", str(results), "--overwrite"]  # of a half-written one
            _call(command, f"the evaluation of division {seed}")
        folders.append(results)
    return folders


def divide(path: str, train_split: str, eval_split: str, seed: int, out: str | Path):
    """Deal the pictures of two splits anew at random and write them as a data set.

    Each split gets its share of each `source`, rounded. The result depends on the names and the seed alone: it is what
    scripts/prepare_data.py makes by --random-split of the same raw folder.

    Raises:
        UserError: If there is no such data set or split, a name occurs twice, or `out` cannot be written.
    """
    splits = load_splits(path, [train_split, eval_split])
    total = sum(map(len, splits.values()))
    whole = concatenate_datasets(list(splits.values()))
    positions = {id: index for index, id in enumerate(whole["id"][:])}
    if len(positions) < total:
        raise UserError(f"{path} cannot be divided: a name occurs twice in {train_split} and {eval_split}; rename it")
    pairs = [Pair(id, source) for id, source in zip(whole["id"][:], whole["source"][:], strict=True)]
    dealt = split_at_random(pairs, {name: len(split) / total for name, split in splits.items()}, seed)
    card = Card(
        title=f"A random division of {path}",
        license="unknown",
        paragraphs={
            "Division": f"{train_split} and {eval_split} dealt anew by seed {seed}, the shares of each source kept.",
            "Terms": f"Those of {path}, whose card names them.",
        },
    )
    with new_data_set(out, overwrite=False) as folder:
        write_card(folder, card, write_splits(folder, _rows(whole, dealt, positions)))


def _rows(whole: Dataset, dealt: list[Pair], positions: dict[str, int]) -> Iterator[tuple[str, dict]]:
    stored = whole.cast_column("image", Image(decode=False)).cast_column("mask", Image(decode=False))
    for pair in dealt:
        row = stored[positions[pair.id]]
        image = row["image"]
        yield (
            pair.split,
            make_row(image["bytes"], image["path"] or pair.id, row["mask"]["bytes"], pair.id, pair.source),
        )


def _call(command: Sequence[str], what: str):
    try:
        failed = subprocess.run(command).returncode != 0
    except OSError as error:
        raise UserError(f"cannot run {command[0]} ({error.strerror}); give another --launcher") from None
    if failed:
        raise UserError(f"{what} failed; mend what it says above and run the same command again")
