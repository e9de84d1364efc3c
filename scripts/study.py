"""Measure what each part of a network contributes: train it without the part, on generated scenes, under several seeds.

Encoders start from one that the plainest variant was trained with, on other pictures, as they would else start from
ImageNet. Finished runs are kept, so the command can be repeated: `python scripts/study.py run --out runs/study`.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from transformers import AutoModel

from unconceal.cli import count
from unconceal.data.generated import build_synthetic
from unconceal.errors import UserError, run_main
from unconceal.files import make_folder, replacing
from unconceal.tables import markdown_table
from unconceal.training.checkpoints import read_progress


@dataclass(frozen=True)
class Study:
    """What to compare, and how.

    Attributes:
        kind: Kind of generated scene.
        size: Side of the pictures.
        common: Settings of all runs, beside those of the network's smoke recipe.
        variants: Settings of each variant, the plainest last.
        pretraining: Settings of the pretraining, beside the plainest variant's.
        metrics: Number of the evaluation -> its title.
        train: Training pictures.
        val: Pictures to evaluate on.
        epochs: Passes over the training pictures.
        pretrain: Pictures for the encoder.
        pretrain_epochs: Passes over those.
    """

    kind: str
    size: int
    common: dict[str, object]
    variants: dict[str, dict[str, str]]
    pretraining: dict[str, object]
    metrics: dict[str, str]
    train: int
    val: int
    epochs: int
    pretrain: int
    pretrain_epochs: int


STUDIES = {
    "run": Study(
        kind="camouflage",
        size=64,
        common={
            "model.ambiguity_weight": 2.0,
            "phases.segmentation.batch_size": 8,
            "phases.segmentation.optimizer.learning_rate": 1e-3,
        },
        variants={
            "RUN, K = 4": {},
            "K = 2": {"model.stage_levels": "[2,0]"},
            "K = 1": {"model.stage_levels": "[0]"},
            "without RSS": {"model.use_state_space": "false"},
            "without ROBE": {"model.use_background": "false"},
            "without residual sparsity": {"model.use_residual_sparsity": "false"},
            "RSS without unfolding": {"model.use_unfolding": "false"},
            "plain decoder": {"model.use_unfolding": "false", "model.use_state_space": "false"},
        },
        pretraining={"phases.segmentation.evaluate_every": 4},
        metrics={"eval_mean_iou_at_0.5": "mean IoU at 0.5", "eval_s_measure": "S", "eval_mae": "MAE"},
        train=320,
        val=100,
        epochs=3,
        pretrain=2000,
        pretrain_epochs=20,
    ),
    "opds": Study(
        kind="intricate",
        size=512,
        common={
            "processor.size": "{height: 512, width: 512}",
            "phases.segmentation.batch_size": 4,
            "phases.segmentation.optimizer.learning_rate": 1e-3,
        },
        variants={
            "OPDS: progressive, multi-scale": {},
            "progressive, single-scale": {"model.level_weights": "[1,0,0,0]"},
            "single head": {"model.decoder_hidden_sizes": "[32]"},
        },
        pretraining={
            "processor.size": "{height: 256, width: 256}",
            "phases.segmentation.batch_size": 8,
            "phases.segmentation.evaluate_every": 4,
        },
        metrics={
            "eval_f_measure_max": "max F",
            "eval_weighted_f_measure": "weighted F",
            "eval_mae": "MAE",
            "eval_s_measure": "S",
        },
        train=320,
        val=50,
        epochs=2,
        pretrain=800,
        pretrain_epochs=4,
    ),
}
ROOT = Path(__file__).parents[1]


def recipe_of(network: str) -> Path:
    return ROOT / f"configs/{network}/smoke.yaml"


def train(network: str, out: Path, data: Path, **settings: object):
    """Run scripts/train.py, or go on with it, unless it has finished."""
    overrides = {"output_dir": out, "data.path": data, "data.num_workers": 0, **settings}
    command = [sys.executable, Path(__file__).with_name("train.py"), recipe_of(network), "--resume"]
    with (out.parent / f"{out.name}.log").open("a") as log:
        done = subprocess.run(
            [*map(str, command), *(f"{key}={value}" for key, value in overrides.items())], stdout=log, stderr=log
        )
    if done.returncode:
        raise UserError(f"the run in {out} failed; see {log.name}")


def make_data(study: Study, folder: Path, num_train: int, seed: int) -> Path:
    if not folder.exists():
        build_synthetic(study.kind, folder, {"train": num_train, "val": study.val}, size=study.size, seed=seed)
    return folder


def pretrain_encoder(network: str, out: Path, num_train: int, epochs: int) -> Path:
    """Train the plainest variant on pictures that the study does not use; return the folder of its encoder."""
    study = STUDIES[network]
    encoder = out / f"encoder-{num_train}x{epochs}"
    if not encoder.exists():
        plainest = list(study.variants.values())[-1]
        settings = {**plainest, "phases.segmentation.epochs": epochs, **study.pretraining}
        run = out / f"pretraining-{num_train}x{epochs}"
        train(network, run, make_data(study, out / f"data-pretraining-{num_train}", num_train, seed=7), **settings)
        AutoModel.from_pretrained(run / "segmentation/last").backbone.save_pretrained(encoder)
    return encoder


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__)
    networks = parser.add_subparsers(dest="network", required=True, metavar="NETWORK")
    for network, study in STUDIES.items():
        sub = networks.add_parser(network, help=f"the variants of {network}: {'; '.join(study.variants)}")
        sub.add_argument(
            "--out",
            required=True,
            type=Path,
            metavar="DIR",
            help="gets a folder of the network's name for data, runs and results.json",
        )
        sub.add_argument(
            "--seeds", nargs="+", type=int, default=[0, 1, 2], help="a run of each variant for each (0 1 2)"
        )
        for name, what in (
            ("train", "training pictures"),
            ("epochs", "passes over them"),
            ("pretrain", "pictures for the encoder"),
            ("pretrain-epochs", "passes over those"),
        ):
            default = getattr(study, name.replace("-", "_"))
            sub.add_argument(f"--{name}", type=count, default=default, metavar="N", help=f"{what} ({default})")
    args = parser.parse_args(argv)
    study = STUDIES[args.network]
    out = make_folder(args.out / args.network)
    data = make_data(study, out / f"data-{args.train}", args.train, seed=0)
    encoder = pretrain_encoder(args.network, out, args.pretrain, args.pretrain_epochs)
    settings = {**study.common, "phases.segmentation.init_backbone_from": encoder}
    settings |= {"phases.segmentation.epochs": args.epochs, "phases.segmentation.evaluate_every": args.epochs}
    rows = []
    for seed in args.seeds:
        for name, changes in study.variants.items():
            run = out / f"{name.replace(' ', '-').replace(',', '').replace(':', '')}-{seed}"
            train(args.network, run, data, seed=seed, **settings, **changes)
            last = run / "segmentation/last"
            parameters = AutoModel.from_pretrained(last).num_parameters()
            measured = read_progress(last).history[-1]
            scores = {metric: measured[metric] for metric in study.metrics}
            rows.append({"variant": name, "seed": seed, "parameters": parameters, **scores})
            with replacing(out / "results.json") as beside:
                beside.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(study, rows))


def table(study: Study, rows: list[dict]) -> str:
    """Return mean and standard deviation over the seeds as Markdown."""
    lines = []
    for name in study.variants:
        runs = [row for row in rows if row["variant"] == name]
        cells = [name, f"{runs[0]['parameters'] / 1e6:.2f} M"]
        for metric in study.metrics:
            values = [row[metric] for row in runs]
            cells.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
        lines.append(cells)
    return markdown_table(["variant", "parameters", *study.metrics.values()], lines)


if __name__ == "__main__":
    run_main(main)
