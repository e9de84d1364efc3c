"""Compare SRS with variants whose guidance is worse or absent.

    python scripts/study_srs.py run RECIPE [KEY=VALUE ...] --out runs/study      # one process for each of --seeds
    python scripts/study_srs.py table --out runs/study

All variants of a seed see the same samples in the same order. The last epoch is scored, on the recipe's `eval_split`.
Of the variant `trained` two more scores are taken: with the mean guidance of all images, and with the guidance of
another image. They tell whether the dynamic parameters matter for an image.
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
    protocol, result = PROTOCOLS[recipe.protocol], {"commit": git_commit(), "protocol": recipe.protocol}

    def score() -> list[dict]:
        options = {"batch_size": 1, "protocol": protocol, "progress": False}
        return evaluate_model(segmenter.model, segmenter.processor, dataset, **options)

    rows = score()
    result["scores"], result["images"] = protocol.summarize(rows), [row["iou"] for row in rows]
    if name in ("trained", "random"):
        scales = read_scales(segmenter, dataset)
        result["variation"] = float((scales.std(dim=0) / scales.square().mean(dim=0).sqrt()).mean())
        for what, given in (("mean", scales.mean(dim=0).expand_as(scales)), ("other", scales.roll(1, dims=0))):
            with given_scales(segmenter, given):
                result[f"{what} guidance"] = protocol.summarize(score())
    with replacing(file) as beside:
        beside.write_text(json.dumps(result))
    print(name, seed, {key: round(value, 4) for key, value in result["scores"].items()}, flush=True)


@torch.inference_mode()
def read_scales(segmenter: Segmenter, dataset) -> torch.Tensor:
    """Return the dynamic parameters of every image, (images, G)."""
    model, found = segmenter.model, []
    for index in range(len(dataset)):
        _, image, _ = read_pair(dataset, index)
        padded, _ = pad_edges(segmenter.processor(image).pixel_values, PADDING_MULTIPLE)
        found.append(model.dynamic_conv.guidance_scale(model.reconstruction_encoder(padded)[-1]))
    return torch.cat(found)


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
            row |= {score: f"{np.mean(values):.3f}", "difference": "", "over images": "", "variation": ""}
            if name != "plain" and len(shared) > 1:
                row["difference"] = difference(
                    [mine[seed][what][score] - plain[seed]["scores"][score] for seed in shared]
                )
            if what == "scores" and name != "plain" and shared:
                changes = [np.subtract(mine[seed]["images"], plain[seed]["images"]) for seed in shared]
                row["over images"] = difference(np.mean(changes, axis=0))
            if what == "scores" and "variation" in next(iter(mine.values())):
                row["variation"] = f"{np.mean([one['variation'] for one in mine.values()]):.3f}"
            rows.append(row)
    return rows


def difference(changes: Sequence[float]) -> str:
    """Return the mean change and Student's interval of 95 %."""
    half = stats.t.ppf(0.975, len(changes) - 1) * stats.sem(changes)
    return f"{np.mean(changes):+.3f} ± {half:.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("recipe", nargs="?", help="recipe of SRS with both phases")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the recipe")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and results")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to run (all)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds to run (0 1 2)")
    parser.add_argument("--score", default="niou", help="score of the table (niou)")
    args = parser.parse_args()
    if args.what == "table":
        rows = make_rows(args.out, args.score)
        print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
        return
    recipe = load_recipe(args.recipe, [f"output_dir={args.out}", *args.overrides])
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.variants:
            run_job(recipe, name, seed, args.out)


if __name__ == "__main__":
    main()
