"""Measure what each part of RUN contributes: train it without the part, on generated camouflage, under several seeds.

Encoders start from one that a plain decoder was trained with, on other pictures, as they would else start from ImageNet.
Finished runs are kept, so the command can be repeated: `python scripts/study_run.py --out runs/study`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from unconceal import RunForImageSegmentation
from unconceal.benchmark import markdown_table
from unconceal.cli import count
from unconceal.data.generated import build_synthetic
from unconceal.errors import UserError, run_main
from unconceal.training.checkpoints import read_progress


# What all runs have in common, pretraining apart.
COMMON = {
    "model.ambiguity_weight": 2.0,
    "phases.segmentation.batch_size": 8,
    "phases.segmentation.optimizer.learning_rate": 1e-3,
}
PLAIN = {"model.use_unfolding": "false", "model.use_state_space": "false"}
VARIANTS = {
    "RUN, K = 4": {},
    "K = 2": {"model.stage_levels": "[2,0]"},
    "K = 1": {"model.stage_levels": "[0]"},
    "without RSS": {"model.use_state_space": "false"},
    "without ROBE": {"model.use_background": "false"},
    "without residual sparsity": {"model.use_residual_sparsity": "false"},
    "RSS without unfolding": {"model.use_unfolding": "false"},
    "plain decoder": PLAIN,
}
METRICS = {"eval_mean_iou_at_0.5": "mean IoU at 0.5", "eval_s_measure": "S", "eval_mae": "MAE"}
RECIPE = Path(__file__).parents[1] / "configs/run/smoke.yaml"
SIZE, NUM_VAL = 64, 100


def train(out: Path, data: Path, **settings: str):
    """Run scripts/train.py, or go on with it, unless it has finished."""
    overrides = {"output_dir": out, "data.path": data, "data.num_workers": 0, **settings}
    command = [sys.executable, Path(__file__).with_name("train.py"), RECIPE, "--resume"]
    with (out.parent / f"{out.name}.log").open("a") as log:
        done = subprocess.run(
            [*map(str, command), *(f"{key}={value}" for key, value in overrides.items())], stdout=log, stderr=log
        )
    if done.returncode:
        raise UserError(f"the run in {out} failed; see {log.name}")


def make_data(folder: Path, num_train: int, seed: int) -> Path:
    if not folder.exists():
        build_synthetic("camouflage", folder, {"train": num_train, "val": NUM_VAL}, size=SIZE, seed=seed)
    return folder


def pretrain_encoder(out: Path, num_train: int, epochs: int) -> Path:
    """Train a plain decoder on pictures that the study does not use; return the folder of its encoder."""
    encoder = out / f"encoder-{num_train}x{epochs}"
    if not encoder.exists():
        settings = {**PLAIN, "phases.segmentation.epochs": epochs, "phases.segmentation.evaluate_every": 4}
        run = out / f"pretraining-{num_train}x{epochs}"
        train(run, make_data(out / f"data-pretraining-{num_train}", num_train, seed=7), **settings)
        model = RunForImageSegmentation.from_pretrained(run / "segmentation/last")
        model.backbone.save_pretrained(encoder)
    return encoder


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder for data, runs and results.json"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="a run of each variant for each (0 1 2)"
    )
    parser.add_argument("--train", type=count, default=320, metavar="N", help="training pictures (320)")
    parser.add_argument("--epochs", type=count, default=3, metavar="N", help="passes over them (3)")
    parser.add_argument("--pretrain", type=count, default=2000, metavar="N", help="pictures for the encoder (2000)")
    parser.add_argument("--pretrain-epochs", type=count, default=20, metavar="N", help="passes over those (20)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    data = make_data(args.out / f"data-{args.train}", args.train, seed=0)
    encoder = pretrain_encoder(args.out, args.pretrain, args.pretrain_epochs)
    settings = {**COMMON, "phases.segmentation.init_backbone_from": encoder}
    settings |= {"phases.segmentation.epochs": args.epochs, "phases.segmentation.evaluate_every": args.epochs}
    rows = []
    for seed in args.seeds:
        for name, changes in VARIANTS.items():
            run = args.out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            train(run, data, seed=seed, **settings, **changes)
            last = run / "segmentation/last"
            parameters = RunForImageSegmentation.from_pretrained(last).num_parameters()
            measured = read_progress(last).history[-1]
            rows.append({"variant": name, "seed": seed, "parameters": parameters} | {m: measured[m] for m in METRICS})
            (args.out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Return mean and standard deviation over the seeds as Markdown."""
    lines = []
    for name in VARIANTS:
        runs = [row for row in rows if row["variant"] == name]
        cells = [name, f"{runs[0]['parameters'] / 1e6:.2f} M"]
        for metric in METRICS:
            values = [row[metric] for row in runs]
            cells.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
        lines.append(cells)
    return markdown_table(["variant", "parameters", *METRICS.values()], lines)


if __name__ == "__main__":
    run_main(main)
