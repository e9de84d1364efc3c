"""Kill trainings at random steps, resume them, and compare with unbroken ones.

    python scripts/kill_check.py --kills 10 --out runs/kill_check

For each network, with one process and with two, a small run is killed by SIGKILL again and again, and resumed each
time. The weights at its end must equal those of an unbroken run, bit for bit. Prints a table. The exit code is 1 if a
row differs.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import yaml
from safetensors.torch import load_file

from unconceal.data.builders import build_synthetic
from unconceal.models.networks import NETWORKS
from unconceal.training import loop
from unconceal.training.recipe import load_recipe
from unconceal.utils.markdown import markdown_table


SIZE, BATCH_SIZE, NUM_IMAGES, EPOCHS = 64, 2, 22, 5
# Networks as small as they get, with every kind of random number: drop path, crops, colors.
MODELS = {
    "srs": {
        "stem_size": 8,
        "hidden_sizes": [8, 8, 8, 16],
        "depths": [1] * 4,
        "reconstruction_stem_size": 8,
        "reconstruction_hidden_sizes": [8, 8, 8, 16],
        "reconstruction_depths": [1] * 4,
    },
    "run": {
        "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4},
        "hidden_size": 8,
        "state_size": 2,
        "window_size": 4,
        "sparsity_hidden_size": 4,
        "reconstruction_hidden_sizes": [8, 8, 8],
    },
    "opds": {
        "backbone_config": {
            "model_type": "mscan_backbone",
            "hidden_sizes": [8] * 4,
            "depths": [1] * 4,
            "mlp_ratios": [2] * 4,
            "drop_path_rate": 0.3,
        },
        "decoder_hidden_sizes": [8] * 4,
        "num_bases": 4,
    },
}


def write_recipe(network: str, data: Path, folder: Path) -> Path:
    """Write the recipe of a small run."""
    phase = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "ema_decay": 0.9, "gradient_accumulation_steps": 2}
    phase["optimizer"] = {"name": "adamw", "learning_rate": 1e-3}
    recipe = {
        "network": network,
        "output_dir": str(folder),
        "model": MODELS[network],
        "data": {"path": str(data), "num_workers": 1, "transforms": {"brightness": 0.3, "max_crop_ratio": 0.2}},
        "processor": {"size": {"height": SIZE, "width": SIZE}},
        "phases": {task: phase for task in NETWORKS[network].tasks},
        "save_every": "1steps",
        "trackers": [],
    }
    file = folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe))
    return file


def start(recipe: Path, num_processes: int, kill_after: int = 0) -> int:
    """Train in new processes; return the exit code.

    Raises:
        RuntimeError: If training failed without a kill.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_processes)]
    command = command if num_processes > 1 else [sys.executable]
    command += [__file__, "--child", str(recipe), "--kill-after", str(kill_after)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    was_killed = kill_after and (done.returncode == -signal.SIGKILL or "Signal 9 (SIGKILL)" in done.stderr)
    if done.returncode and not was_killed:
        raise RuntimeError(f"training failed: {' '.join(command)}\n{done.stderr}")
    return done.returncode


def run_child(recipe: Path, kill_after: int):
    """Train in this process, and kill it after some steps."""
    original, steps = loop.train_step, 0

    def train_step(*arguments, **options):
        nonlocal steps
        steps += 1
        if steps == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    loop.train_step = train_step
    loop.train(load_recipe(recipe), resume=True)


def check(network: str, num_processes: int, kills: int, out: Path, rng: np.random.Generator) -> dict[str, str]:
    """Compare an unbroken run of a network with a killed one."""
    data = out / "data"
    unbroken, killed = (out / f"{network}-{num_processes}-{name}" for name in ("unbroken", "killed"))
    start(write_recipe(network, data, unbroken), num_processes)
    tasks = NETWORKS[network].tasks
    steps = len(tasks) * EPOCHS * math.ceil(NUM_IMAGES / BATCH_SIZE / num_processes)
    recipe, deaths, starts, code = write_recipe(network, data, killed), Counter(), 0, 1
    while code and starts < 10 * kills:
        starts += 1
        # The kills are spread over most of the run, so over all phases.
        step = int(rng.integers(2, max(3, round(1.6 * steps / kills)) + 1))
        code = start(recipe, num_processes, step if deaths.total() < kills else 0)
        if code:
            deaths[[task for task in tasks if (killed / task).is_dir()][-1]] += 1
    rows = []
    for task in tasks:
        one, other = (folder / task / "last" for folder in (unbroken, killed))
        equal = [np.array_equal(a, b) for a, b in zip(weights(one), weights(other), strict=True)]
        losses = [[row["train_loss"] for row in history(folder)] for folder in (one, other)]
        same_losses = losses[0] == losses[1]
        rows.append(
            f"{task}: {deaths[task]} kills, {sum(equal)} of {len(equal)} tensors"
            + ", other losses" * (not same_losses)
        )
        code = code or not (all(equal) and same_losses)
    return {
        "network": network,
        "processes": str(num_processes),
        "kills": str(deaths.total()),
        "equal": "no" if code else "yes",
        "why": "; ".join(rows),
    }


def weights(folder: Path) -> list[np.ndarray]:
    """Return the weights of a checkpoint, by name."""
    return [tensor.numpy() for _, tensor in sorted(load_file(folder / "model.safetensors").items())]


def history(folder: Path) -> list[dict]:
    """Return the epochs of a checkpoint."""
    return json.loads((folder / "progress.json").read_text())["history"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of data and runs, new")
    parser.add_argument("--kills", type=int, default=10, help="kills of each run (10)")
    parser.add_argument("--networks", nargs="+", choices=MODELS, default=list(MODELS), help="networks (all)")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="numbers of processes (1 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which runs are killed (0)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill-after", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child, args.kill_after)
        return
    if not args.out or args.out.exists():
        parser.error("give a new folder by --out")
    build_synthetic("ultrasound", args.out / "data", {"train": NUM_IMAGES, "val": 3}, size=SIZE)
    rng = np.random.default_rng(args.seed)
    rows = []
    for network in args.networks:
        for num_processes in args.processes:
            rows.append(check(network, num_processes, args.kills, args.out, rng))
            print(rows[-1], flush=True)
    keys = ["network", "processes", "kills", "equal", "why"]
    print(markdown_table(keys, [[row.get(key, "") for key in keys] for row in rows]))
    raise SystemExit(any(row["equal"] != "yes" for row in rows))


if __name__ == "__main__":
    main()
