"""Make a shipped network out of a training run."""

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..api import Segmenter, load
from ..data.loading import read_pair
from ..data.masks import is_object
from ..drawing.outlines import Outlined, draw_outlines
from ..evaluation.base import Protocol
from ..evaluation.networks import evaluate_model
from ..evaluation.protocol_segmentation import PROTOCOL as SEGMENTATION
from ..evaluation.protocols import PROTOCOLS
from ..evaluation.tables import Result, stamp
from ..training.recipe import Recipe
from ..training.start import load_data
from ..utils.commits import git_commit
from ..utils.digests import weights_digest
from ..utils.errors import UserError
from ..utils.files import replacing
from ..utils.images import size_text
from . import shipped
from .cards import Shipment, Training, make_model_card, network_name
from .shipped import CARD, CONFIG, PROCESSOR, WEIGHTS, weights_sha256
from .stage import check_results, read_origin, save_without_paths


MAX_MEGABYTES = 12  # of one network
FIGURE, NUM_FAILURES = "failures.webp", 8
# Both point at code, which these folders do not have.
CODE_KEYS = ("auto_map", "custom_pipelines")


@cache
def load_texts() -> dict[str, dict[str, Any]]:
    """Return what people wrote about each network that ships."""
    return yaml.safe_load(resources.files(__package__).joinpath("shipped.yaml").read_text(encoding="utf-8"))


def ship_model(
    run: Path,
    name: str,
    checkpoint: Path | None = None,
    results: Sequence[Path] = (),
    folder: Path | None = None,
) -> Path:
    """Write `pretrained/NAME`: rounded weights, settings, and a card from records.

    The rounded network is scored on the validation split of the run before anything is replaced.

    Args:
        run: Folder that `unconceal train` wrote.
        name: Entry of `shipped.yaml`.
        checkpoint: Checkpoint of the run, by default the best one.
        results: Further results of the rounded weights for the card, that `unconceal evaluate --out` wrote.
        folder: Where to write instead of `pretrained/NAME`.

    Raises:
        UserError: If a record is missing, the weights cannot be rounded, or the files are too large.
    """
    texts, folder = load_texts(), folder or shipped.FOLDER / name
    if name not in texts:
        raise UserError(f"got the name {name}, expected one of {', '.join(texts)}; describe it in hub/shipped.yaml")
    checkpoint = checkpoint or run / "segmentation" / "best"
    segmenter = load(checkpoint, "cpu")
    training = read_origin(checkpoint, segmenter.model)
    if not isinstance(training, Training):
        raise UserError(
            f"got {checkpoint}, which has no progress.json with a recipe; name a checkpoint of unconceal train"
        )
    with replacing(folder) as beside:
        write_rounded(segmenter, beside)
        num_bytes = sum(path.stat().st_size for path in beside.iterdir())
        if num_bytes > 1e6 * MAX_MEGABYTES:
            advice = "ship a smaller one"
            raise UserError(f"{name} takes {num_bytes / 1e6:.1f} MB, expected at most {MAX_MEGABYTES}; {advice}")
        segmenter = load(beside, "cpu")
        dataset = load_data(training.recipe.data)[training.recipe.data.eval_split]
        rows = {
            protocol.name: evaluate_model(segmenter.model, segmenter.processor, dataset, protocol=protocol, **options)
            for protocol, options in _protocols(training.recipe)
        }
        counts = rows[SEGMENTATION.name]
        figure = draw_failures(segmenter, dataset, counts)
        figure.save(beside / FIGURE, lossless=True)
        shipment = Shipment(
            name=name,
            text=texts[name],
            facts=_facts(segmenter, name, texts[name], training, beside),
            false_alarms=_false_alarms(counts),
            figure=FIGURE,
            figure_text=f"The {min(NUM_FAILURES, len(counts))} worst images of the validation split: outlines of the "
            "object in blue, of what was found in orange.",
        )
        measured = _results(segmenter, name, training.recipe, rows, counts)
        measured += check_results(results, segmenter.model, beside)
        card = make_model_card(segmenter, name, training, measured, texts[name]["license"], shipment)
        (beside / CARD).write_text(card, encoding="utf-8")
    return folder


def write_rounded(segmenter: Segmenter, folder: Path):
    """Write weights in float16, configuration and processor, without code.

    Buffers and the parameters that half precision would harm stay in float32. The configuration asks for float32, so
    everything is loaded in that type.

    Raises:
        UserError: If a weight is too large for float16.
    """
    save_without_paths(segmenter, folder)
    for path in folder.iterdir():
        if path.name not in (CONFIG, PROCESSOR):
            path.unlink()
    for file in (CONFIG, PROCESSOR):
        settings = json.loads((folder / file).read_text(encoding="utf-8"))
        settings = {key: value for key, value in settings.items() if key not in CODE_KEYS}
        if file == CONFIG:
            settings["dtype"] = "float32"
        (folder / file).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(rounded_state(segmenter.model), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # save_file lets only its user read it


def rounded_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the state with parameters in float16 where that does no harm."""
    kept = set(model._keep_in_fp32_modules_strict or ())
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not kept & set(name.split(".")):
            state[name] = parameter.detach().half().contiguous()
            if not state[name].isfinite().all():
                raise UserError(f"the weights {name} do not fit into float16; train with more weight decay")
    return state


def draw_failures(segmenter: Segmenter, dataset: Dataset, counts: list[dict[str, Any]]):
    """Draw the outlines of the images with the lowest IoU."""

    def rank(index: int) -> tuple[float, float]:
        row = counts[index]
        return row["iou"], -(row["fp"] + row["fn"]) / (row["height"] * row["width"])

    cases = []
    for index in sorted(range(len(counts)), key=rank)[:NUM_FAILURES]:
        _, image, mask = read_pair(dataset, index)
        found = segmenter.segment(image, refine="never") > 0.5
        cases.append(Outlined(f"IoU {counts[index]['iou']:.2f}", is_object(mask), found))
    return draw_outlines(cases)


def _protocols(recipe: Recipe) -> list[tuple[Protocol, dict[str, Any]]]:
    """Return the protocols of run and binary masks, with options."""
    names = dict.fromkeys((recipe.protocol, SEGMENTATION.name))
    return [(PROTOCOLS[name], PROTOCOLS[name].options(**PROTOCOLS[name].report_options)) for name in names]


def _has_object(row: Mapping[str, Any]) -> bool:
    return row["tp"] + row["fn"] > 0


def _false_alarms(counts: list[dict[str, Any]]) -> tuple[int, int] | None:
    empty = [row for row in counts if not _has_object(row)]
    return (sum(row["fp"] > 0 for row in empty), len(empty)) if empty else None


def _results(
    segmenter: Segmenter, name: str, recipe: Recipe, rows: dict[str, list[dict]], counts: list[dict[str, Any]]
) -> list[Result]:
    """Return the results of every protocol, on images with an object apart."""
    with_object = [_has_object(row) for row in counts]
    parts = [("images with an object", with_object)] if 0 < sum(with_object) < len(counts) else []
    (path, *more), data = recipe.data.paths, recipe.data
    date = datetime.now(UTC).isoformat(timespec="seconds")
    shared = {
        "path": Path(name),
        "name": name,
        "sources": tuple(sorted({row["source"] for row in counts})),
        "stamps": (stamp(date, git_commit()),),
        "split": data.eval_split,
        "split_seed": data.split_seed,
        "weights": weights_digest(segmenter.model),
        "data": None if more else path,
        "date": date,
    }
    results = []
    for protocol in (PROTOCOLS[key] for key in rows):
        command = ["unconceal", "evaluate", "--model", name, "--data", path, "--split", data.eval_split]
        command += ["--split-seed", str(data.split_seed)] if data.split_seed is not None else []
        shared["command"] = None if more else shlex.join([*command, "--protocol", protocol.name])
        for settings, chosen in (*parts, ("", [True] * len(counts))):
            part = [row for row, is_chosen in zip(rows[protocol.name], chosen, strict=True) if is_chosen]
            figures = protocol.summarize(part)
            number = figures.pop("num_images")
            options = {"figures": figures, "num_images": number, "settings": (settings,) if settings else ()}
            results.append(Result(protocol=protocol, **options, **shared))
    return results


def _facts(
    segmenter: Segmenter, name: str, text: Mapping[str, Any], training: Training, folder: Path
) -> dict[str, Any]:
    """Return the facts for the header of the card."""
    encoder = [Path(start["source"]).name for start in training.starts() if start["part"] == "encoder"]
    titles = [one.get("title") or Path(one["path"]).name for one in training.data()]
    size = segmenter.processor.size
    return {
        "name": name,
        "task": text["task"],
        "network": " with ".join([network_name(segmenter.model.config).upper(), *encoder]),
        "parameters": segmenter.model.num_parameters(),
        "megabytes": round((folder / WEIGHTS).stat().st_size / 1e6, 2),
        "input_size": size_text((size.width, size.height)) if segmenter.processor.do_resize else "as it is",
        "data": ", ".join(dict.fromkeys(title.partition(":")[0] for title in titles)),
        "terms": text["terms"],
        "headline": list(text["headline"]),
        "sha256": weights_sha256(folder),
    }
