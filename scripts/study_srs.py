"""Compare SRS with variants whose guidance is worse or absent.

    python scripts/study_srs.py run RECIPE [KEY=VALUE ...] --out runs/study      # one process for each of --seeds
    python scripts/study_srs.py table --out runs/study
    python scripts/study_srs.py network MODEL --data DATA --protocol infrared      # of one network, e.g. small-target

All variants of a seed see the same samples in the same order. The last epoch is scored, on the recipe's `eval_split`.
Variants with guidance are scored twice more: with the mean guidance of all images, and with the guidance of another
image. These scores tell whether the dynamic parameters matter for an image.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from scipy import stats

import unconceal
from unconceal.api import Segmenter
from unconceal.data.loading import load_splits, read_pair
from unconceal.evaluation.networks import evaluate_model
from unconceal.evaluation.protocols import PROTOCOLS
from unconceal.models import modeling_srs
from unconceal.models.modeling_srs import PADDING_MULTIPLE, SrsDynamicConv
from unconceal.models.modeling_unconceal import pad_edges
from unconceal.training.loop import train
from unconceal.training.recipe import Recipe, load_recipe
from unconceal.utils.commits import git_commit
from unconceal.utils.files import replacing
from unconceal.utils.markdown import markdown_table


class ConstantGuidance(SrsDynamicConv):
    """Dynamic convolution whose parameters are learned, the same for all images."""

    def guidance_scale(self, guidance):
        return self.project.bias.expand(len(guidance), -1)


class PlainConvolution(SrsDynamicConv):
    """3x3 convolution without guidance; in inference it costs as much."""

    def forward(self, hidden_states, guidance):
        return self.static_conv(hidden_states)


# Variant -> what tables call it, its dynamic convolution, and whether R is trained first.
VARIANTS = {
    "trained": ("R trained", SrsDynamicConv, True),
    "random": ("R random", SrsDynamicConv, False),
    "constant": ("constant guidance", ConstantGuidance, False),
    "plain": ("plain convolution", PlainConvolution, False),
}


@contextmanager
def variant_networks(name: str) -> Iterator[None]:
    """Make SRS networks of a variant for a while."""
    usual = modeling_srs.SrsDynamicConv
    modeling_srs.SrsDynamicConv = VARIANTS[name][1]
    try:
        yield
    finally:
        modeling_srs.SrsDynamicConv = usual


def run_job(recipe: Recipe, name: str, seed: int, out: Path):
    """Train and score a variant, unless that is done."""
    file = out / f"{name}-{seed}.json"
    if file.exists():
        return
    phases = deepcopy(recipe.phases)
    phases["segmentation"].evaluate_every = phases["segmentation"].epochs
    reconstruction = phases.pop("reconstruction")
    if VARIANTS[name][2]:
        first = {"phases": {"reconstruction": reconstruction}, "output_dir": str(out / f"r-{seed}")}
        phases["segmentation"].init_from = str(train(replace(recipe, seed=seed, **first), resume=True))
    with variant_networks(name):
        folder = str(out / f"{name}-{seed}")
        best = train(replace(recipe, phases=phases, seed=seed, output_dir=folder), resume=True)
        segmenter = unconceal.load(best)
    dataset = load_splits(recipe.data.paths[0], [recipe.data.eval_split])[recipe.data.eval_split]
    result = {"commit": git_commit(), "protocol": recipe.protocol}
    result |= score_network(segmenter, dataset, recipe.protocol, guided=name in ("trained", "random"))
    with replacing(file) as beside:
        beside.write_text(json.dumps(result))
    print(name, seed, {key: round(value, 4) for key, value in result["scores"].items()}, flush=True)


def score_network(segmenter: Segmenter, dataset: Dataset, protocol_name: str, guided: bool) -> dict:
    """Return scores, IoU of each image and, if guided, what guidance does."""
    protocol = PROTOCOLS[protocol_name]

    def score() -> list[dict]:
        options = {"batch_size": 1, "protocol": protocol, "progress": False}
        return evaluate_model(segmenter.model, segmenter.processor, dataset, **options)

    rows = score()
    result = {"scores": protocol.summarize(rows), "images": [row["iou"] for row in rows]}
    if guided:
        scales = read_scales(segmenter, dataset)
        result["variation"] = float((scales.std(dim=0) / scales.square().mean(dim=0).sqrt()).mean())
        result["kernel variation"] = kernel_variation(segmenter.model.dynamic_conv, scales)
        for what, given in (("mean", scales.mean(dim=0).expand_as(scales)), ("other", scales.roll(1, dims=0))):
            with given_scales(segmenter, given):
                result[f"{what} guidance"] = protocol.summarize(score())
    return result


@torch.inference_mode()
def read_scales(segmenter: Segmenter, dataset: Dataset) -> torch.Tensor:
    """Return the dynamic parameters of every image, (images, G)."""
    model, found = segmenter.model, []
    for index in range(len(dataset)):
        _, image, _ = read_pair(dataset, index)
        padded, _ = pad_edges(segmenter.processor(image).pixel_values, PADDING_MULTIPLE)
        found.append(model.dynamic_conv.guidance_scale(model.reconstruction_encoder(padded)[-1]))
    return torch.cat(found)


@torch.inference_mode()
def kernel_variation(conv: SrsDynamicConv, scales: torch.Tensor) -> float:
    """Return the mean distance from the mean kernel, relative to its norm."""
    scales = scales.repeat_interleave(conv.channels_per_scalar, dim=1)[:, :, None, None, None]
    mean = conv.static_conv.weight + scales.mean(dim=0) * conv.scaled_conv.weight
    changes = [((scale - scales.mean(dim=0)) * conv.scaled_conv.weight).norm() for scale in scales]
    return float(torch.stack(changes).mean() / mean.norm())


@contextmanager
def given_scales(segmenter: Segmenter, scales: torch.Tensor) -> Iterator[None]:
    """Give the images of a data set these parameters, in order."""
    conv, left = segmenter.model.dynamic_conv, iter(scales.split(1))
    conv.guidance_scale = lambda guidance: next(left)
    try:
        yield
    finally:
        del conv.guidance_scale


def make_rows(out: Path, score: str) -> list[dict[str, str]]:
    """Return means and differences to `plain`.

    `difference` is that of the score, paired by seed. `over images` is that of the IoU of each image, mean over seeds.
    `variation` is the standard deviation of a dynamic parameter over images, divided by its root mean square.
    `of kernels` is the mean distance of an image's kernel from the mean kernel, divided by the norm of the latter.
    """
    files = {name: sorted(out.glob(f"{name}-*.json")) for name in VARIANTS}
    found = {
        name: {file.stem.rpartition("-")[2]: json.loads(file.read_text()) for file in paths}
        for name, paths in files.items()
    }
    rows = []
    for name, (title, _, _) in VARIANTS.items():
        mine, plain = found[name], found["plain"]
        shared = [seed for seed in mine if seed in plain]
        for what in ("scores", "mean guidance", "other guidance"):
            values = [one[what][score] for one in mine.values() if what in one]
            if not values:
                continue
            row = {"variant": title if what == "scores" else f"{title}, {what}", "seeds": str(len(values))}
            row[score] = f"{np.mean(values):.3f}"
            row |= dict.fromkeys(("difference", "over images", "variation", "of kernels"), "")
            if name != "plain" and len(shared) > 1:
                row["difference"] = difference(
                    [mine[seed][what][score] - plain[seed]["scores"][score] for seed in shared]
                )
            if what == "scores" and name != "plain" and shared:
                changes = [np.subtract(mine[seed]["images"], plain[seed]["images"]) for seed in shared]
                row["over images"] = difference(np.mean(changes, axis=0))
            if what == "scores" and "variation" in next(iter(mine.values())):
                row["variation"] = f"{np.mean([one['variation'] for one in mine.values()]):.3f}"
                row["of kernels"] = f"{np.mean([one['kernel variation'] for one in mine.values()]):.3f}"
            rows.append(row)
    return rows


def difference(changes: Sequence[float]) -> str:
    """Return the mean change and Student's interval of 95 %."""
    half = stats.t.ppf(0.975, len(changes) - 1) * stats.sem(changes)
    return f"{np.mean(changes):+.3f} ± {half:.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and score variants")
    run.add_argument("recipe", help="recipe of SRS with both phases")
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the recipe")
    run.add_argument("--out", type=Path, required=True, help="folder of runs and results")
    run.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to run (all)")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds to run (0 1 2)")
    table = commands.add_parser("table", help="print the scores of all variants")
    table.add_argument("--out", type=Path, required=True, help="folder of runs and results")
    table.add_argument("--score", default="niou", help="score of the table (niou)")
    network = commands.add_parser("network", help="score one network with its own and other guidance")
    network.add_argument("model", help="folder or name of a network")
    network.add_argument("--data", required=True, help="prepared data set")
    network.add_argument("--split", default="val", help="split to score (val)")
    network.add_argument("--protocol", choices=PROTOCOLS, required=True)
    args = parser.parse_args()
    if args.command == "table":
        rows = make_rows(args.out, args.score)
        print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
        return
    if args.command == "network":
        dataset = load_splits(args.data, [args.split])[args.split]
        result = score_network(unconceal.load(args.model), dataset, args.protocol, guided=True)
        print(json.dumps({key: value for key, value in result.items() if key != "images"}, indent=2))
        return
    recipe = load_recipe(args.recipe, [f"output_dir={args.out}", *args.overrides])
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.variants:
            run_job(recipe, name, seed, args.out)


if __name__ == "__main__":
    main()
