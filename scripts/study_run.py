"""Compare RUN with variants of itself, on a frozen encoder.

    python scripts/study_run.py cache --data data/kvasir --out runs/study
    python scripts/study_run.py run --out runs/study      # one per core; each takes the next job that is free
    python scripts/study_run.py table --out runs/study

The encoder is EfficientNet-Lite0, frozen. So its features are computed once, for each image and its three flips. All
variants train on the same images in the same order. 100 images of the training split are held out. On them the
learning rates are chosen and the stages looked at. The validation split is scored, too, but shown only by
`table --validation`, once all runs are done.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from unconceal import RunConfig, RunForImageSegmentation, UnconcealImageProcessor
from unconceal.data.loading import load_splits, read_pair
from unconceal.evaluation.cost import multiply_adds
from unconceal.evaluation.protocol_cod import score_image
from unconceal.hub.encoders import packaged_encoder
from unconceal.models.backbones import FINEST_STRIDE, NUM_LEVELS
from unconceal.models.losses import contour_weights, structure_loss
from unconceal.models.memory import keep_freed_memory
from unconceal.models.modeling_run import RunMaskStep, RunStage, mean_logit
from unconceal.models.modeling_unconceal import upsample
from unconceal.models.run_layers import RunConvNormAct
from unconceal.utils.commits import git_commit
from unconceal.utils.files import replacing
from unconceal.utils.markdown import markdown_table


SIZE = 160
MEAN, STD = (0.498039,) * 3, (0.501961,) * 3
HELD_OUT = 100
# Flips of the cached features: along no axis, the width, the height, both.
FLIPS = ((), (-1,), (-2,), (-2, -1))
BATCH_SIZE = 10
AVERAGE_DECAY = 0.99
# Labelled images: optimizer steps and seeds.
LABELS = {100: (400, 5), 700: (700, 3)}
# The learning rate is chosen for each of these; other plain decoders take that of `plain`, the rest that of `share`.
FAMILIES = ("plain", "share", "correction")
LEARNING_RATES = (1.5e-3, 4.5e-3, 1.35e-2)
TUNING_SEEDS = {100: 2, 700: 1}
SCORES = {"dice_at_0.5": "mean Dice at 0.5", "s_measure": "S", "mae": "MAE"}


class ConvBlock(nn.Sequential):
    """Residual block of two 3x3 convolutions, in place of a scan."""

    def __init__(self, channels: int):
        super().__init__(*(RunConvNormAct(channels, channels, kernel_size=3) for _ in range(2)))

    def forward(self, hidden_states):
        return hidden_states + super().forward(hidden_states)


class PlainStage(RunStage):
    """Stage that ignores closed form and background."""

    def forward(self, neck_features, hidden_states, mask, share, estimate):
        features = self.features(torch.cat([neck_features, hidden_states], dim=1))
        hidden_states = self.small_field(features) + self.large_field(features)
        return hidden_states, self.mask_head(hidden_states), self.edge_head(hidden_states)


class GatedStage(RunStage):
    """Stage whose closed form is a gate only; its mask is new."""

    def forward(self, neck_features, hidden_states, mask, share, estimate):
        return super().forward(neck_features, hidden_states, mask, share, torch.zeros_like(estimate))


class UngatedStage(RunStage):
    """Stage that corrects the closed form and has no gates."""

    def forward(self, neck_features, hidden_states, mask, share, estimate):
        off = torch.zeros_like(mask)
        return super().forward(neck_features, hidden_states, off, off, estimate)


class MaskStepWithoutSparsity(RunMaskStep):
    """Closed-form mask without the residual sparsity term."""

    def forward(self, k, energy, share_logits, previous, before_previous):
        return mean_logit([-share_logits, previous], [energy, self.proximity[k - 1]])


class PreviousMask(nn.Module):
    """No closed form: the mask of the stage before."""

    def forward(self, k, energy, share_logits, previous, before_previous):
        return previous.float()


class CutOutBackground(nn.Module):
    """No ROBE: the image outside the mask."""

    def forward(self, k, image, mask_logits, share_logits, features, context):
        return -mask_logits.float(), None


class RunWithLastStep(RunForImageSegmentation):
    """RUN whose last mask is the closed form of M_K and B_K."""

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.last_step = RunMaskStep(config)

    def run_stages(self, full_image, pyramid, full):
        maps = super().run_stages(full_image, pyramid, full=True)
        energy = nn.functional.avg_pool2d(full_image.square().sum(dim=1, keepdim=True), FINEST_STRIDE)
        before, last = maps["mask_logits"][-2:]
        before = upsample(before, last.shape[-1] // before.shape[-1])
        logits = self.last_step(1, energy, maps["share_logits"][-1], last, before)
        return maps | {"logits": logits}

    def loss_terms(self, labels, image, logits, mask_logits, *maps):
        config, last = self.config, upsample(mask_logits[-1], FINEST_STRIDE)
        weights = contour_weights(labels)
        last = structure_loss(last, labels, weights, config.bce_weight, config.iou_weight)
        return {**super().loss_terms(labels, image, logits, mask_logits, *maps), "last": last}


class PlainDecoder(RunForImageSegmentation):
    """Neck, coarse mask and stages without any unfolding."""

    def run_stages(self, full_image, pyramid, full):
        hidden_states, logits = self.coarse_head(pyramid[-1])
        maps = {"mask_logits": [logits], "edge_logits": [], "share_logits": [], "hidden_states": [hidden_states]}
        level_before = NUM_LEVELS - 1
        for stage, level in zip(self.stages, self.config.stage_levels, strict=True):
            hidden_states = upsample(hidden_states, 2 ** (level_before - level))
            hidden_states, logits, edges = stage(pyramid[level], hidden_states, None, None, None)
            maps["mask_logits"].append(logits)
            maps["edge_logits"].append(edges)
            level_before = level
        reconstructions = [None] * len(maps["mask_logits"])
        return maps | {"logits": logits, "backgrounds": [], "reconstructions": reconstructions}


# Name of a variant: what a table calls it, changes of the configuration.
VARIANTS = {
    "plain_1": ("plain decoder, K = 1", {"stage_levels": (0,)}),
    "plain": ("plain decoder, K = 4", {}),
    "plain_wide": ("plain decoder, K = 4, wider", {"hidden_size": 40}),
    "no_robe": ("RUN without ROBE", {"background_weight": 0}),
    "correction": (
        "RUN before, ROBE as a correction",
        {"background_step": "correction", "coarse_dilations": (6, 12, 18)},
    ),
    "share": ("RUN, taught background", {}),
    "last_step": ("taught, ends on a closed form", {}),
    "non_local": ("RUN, non-local background", {"background_step": "non_local"}),
    "gates": ("taught, closed form as a gate only", {}),
    "no_gates": ("taught, without gates", {}),
    "no_sparsity": ("taught, without residual sparsity", {}),
    "previous": ("taught, M^ = M_{k-1}", {}),
    "rss": ("taught, with RSS", {}),
}
# Rows that are compared at each number of labels. Parts of RUN are taken apart at the lower one, with its five seeds.
ROWS = {
    100: tuple(VARIANTS),
    700: ("plain_1", "plain", "plain_wide", "no_robe", "correction", "share", "non_local"),
}
STAGES = {"gates": GatedStage, "no_gates": UngatedStage}


def make_variant(name: str, **changes) -> RunForImageSegmentation:
    """Build a variant of RUN with random weights.

    Apart from `rss`, all have convolutions in place of the scans, which take most of the time.
    """
    sizes = {"hidden_size": 32, "state_size": 8, "expand": 1, "image_mean": MEAN, "image_std": STD}
    backbone = {"model_type": "efficientnet_lite_backbone"}
    config = RunConfig(**{"backbone_config": backbone, **sizes, **VARIANTS[name][1], **changes})
    kind = PlainDecoder if name.startswith("plain") else RunForImageSegmentation
    model = (RunWithLastStep if name == "last_step" else kind)(config)
    stage = PlainStage if kind is PlainDecoder else STAGES.get(name)
    if stage:
        model.stages = nn.ModuleList(stage(config) for _ in model.stages)
    if name != "rss":
        for one in model.stages:
            one.small_field, one.large_field = (ConvBlock(config.hidden_size) for _ in range(2))
    if kind is PlainDecoder:
        del model.mask_step, model.background_step
    elif name == "no_robe":
        model.background_step = CutOutBackground()
    elif name == "no_sparsity":
        model.mask_step = MaskStepWithoutSparsity(config)
    elif name == "previous":
        model.mask_step = PreviousMask()
    model.post_init()
    if name == "no_sparsity":
        del model.mask_step.raw_sparsity, model.mask_step.sparsity_gradient
    return model


def cache_features(data: str, out: Path):
    """Write images, masks and features of all flips."""
    splits = load_splits(data, ["train", "val"])
    processor = UnconcealImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD)
    model = make_variant("plain")
    with packaged_encoder("efficientnet-lite0") as folder:
        model.load_backbone(str(folder))
    model = model.for_inference()
    order = np.random.default_rng(0).permutation(len(splits["train"]))
    rows = {
        "train": [("train", int(row)) for row in order[HELD_OUT:]],
        "held_out": [("train", int(row)) for row in order[:HELD_OUT]],
        "validation": [("val", row) for row in range(len(splits["val"]))],
    }
    out.mkdir(parents=True, exist_ok=True)
    for part, places in rows.items():
        flips = FLIPS if part == "train" else FLIPS[:1]
        images, masks, levels = [], [], [[] for _ in range(NUM_LEVELS)]
        for split, row in places:
            _, image, mask = read_pair(splits[split], row)
            sample = processor(images=image, segmentation_maps=mask, return_tensors="pt")
            pixel_values = torch.cat([sample.pixel_values.flip(flip) for flip in flips])
            with torch.inference_mode():
                for level, features in zip(levels, model.encode(pixel_values), strict=True):
                    level.append(features.half())
            images.append(pixel_values.half())
            masks.append(torch.stack([sample.labels[0].flip(flip) for flip in flips]).half())
        for name, values in {
            "images": images,
            "masks": masks,
            **{str(i): one for i, one in enumerate(levels)},
        }.items():
            np.save(out / f"{part}_{name}.npy", torch.stack(values).numpy())
        print(part, len(places))


class Cached:
    """A part of the cached data, memory-mapped; (image, flip, ...)."""

    def __init__(self, out: Path, part: str):
        names = ["images", "masks", *map(str, range(NUM_LEVELS))]
        self.arrays = [np.load(out / f"{part}_{name}.npy", mmap_mode="r") for name in names]

    def __len__(self) -> int:
        return len(self.arrays[0])

    def batch(self, rows: np.ndarray, flips: np.ndarray | int = 0) -> tuple[torch.Tensor, torch.Tensor, list]:
        """Return images, masks and features, in float32."""
        images, masks, *levels = (torch.from_numpy(array[rows, flips]).float() for array in self.arrays)
        return images, masks, levels


def train_variant(out: Path, name: str, labels: int, seed: int, learning_rate: float) -> dict:
    """Train a variant, and score it on both held-out parts."""
    num_steps = LABELS[labels][0]
    torch.manual_seed(seed)
    model = make_variant(name)
    cost = multiply_adds(make_variant(name).to("meta"), SIZE)
    parameters = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("backbone."))
    del model.backbone
    model.encode = lambda _: model.features
    train = Cached(out, "train")
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(train))[:labels]
    queue = np.concatenate([rng.permutation(rows) for _ in range(num_steps * BATCH_SIZE // labels)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, (1 + math.cos(math.pi * step / num_steps)) / 2)
    )
    # A running mean of the weights, as in the recipes: it halves the spread between seeds.
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
    model.train()
    began = time.perf_counter()
    for step, batch in enumerate(queue.reshape(-1, BATCH_SIZE)):
        images, masks, model.features = train.batch(batch, rng.integers(len(FLIPS), size=BATCH_SIZE))
        model.training_progress = step / num_steps
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images, labels=masks).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
    model.load_state_dict(averaged.module.state_dict())
    seconds = time.perf_counter() - began
    result = {"seconds": round(seconds), "parameters": parameters, "multiply_adds": cost[""] - cost["backbone"]}
    model.eval()
    for part in ("held_out", "validation"):
        result |= {f"{part}_{key}": value for key, value in score(model, Cached(out, part)).items()}
    if hasattr(model, "mask_step") and hasattr(model.mask_step, "proximity"):
        for step, names in ((model.mask_step, ("proximity", "sparsity")), (model.background_step, ("proximity",))):
            for key in names:
                if hasattr(step, key):
                    result[f"{type(step).__name__}.{key}"] = [round(v, 4) for v in getattr(step, key).tolist()]
    return result


@torch.inference_mode()
def score(model: RunForImageSegmentation, data: Cached) -> dict:
    """Return scores of each image, and Brier scores around closed forms.

    All maps of a stage have its stride. There the truth is the mean of the mask.
    """
    steps = []
    if hasattr(model, "mask_step"):
        handle = model.mask_step.register_forward_hook(lambda _, inputs, output: steps.append((inputs, output)))
    rows, errors = [], {}
    for start in range(0, len(data), BATCH_SIZE):
        images, masks, model.features = data.batch(np.arange(start, min(start + BATCH_SIZE, len(data))))
        steps.clear()
        output = model(images, output_stages=True)
        for k, (inputs, estimate) in enumerate(steps, start=1):
            maps = read_step(inputs, estimate) | {"M_k": output.mask_logits[k].sigmoid()}
            truth = nn.functional.adaptive_avg_pool2d(masks[:, None], estimate.shape[-2:])
            for key, one in maps.items():
                errors.setdefault(f"{k} {key}", []).append((one - truth).square().mean().item())
        for probs, mask in zip(output.logits.sigmoid()[:, 0].numpy(), masks.numpy() > 0.5, strict=True):
            scores = score_image(probs, mask, min_max=False)
            rows.append([round(scores[key], 5) for key in SCORES])
    if hasattr(model, "mask_step"):
        handle.remove()
    return {"images": rows, "stages": {key: round(float(np.mean(values)), 5) for key, values in errors.items()}}


def read_step(inputs: tuple, estimate: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return probabilities that go into a closed form and come out."""
    if isinstance(inputs[0], int):
        _, _, share_logits, previous, _ = inputs
        return {"M_{k-1}": previous.sigmoid(), "1 - s_{k-1}": (-share_logits).sigmoid(), "M^_k": estimate.sigmoid()}
    image, background, previous, _ = inputs  # ROBE as a correction has colors and probabilities
    energy = image.square().sum(dim=1, keepdim=True)
    opinion = (image * (image - background)).sum(dim=1, keepdim=True) / energy.clamp(min=1e-6)
    return {"M_{k-1}": previous, "1 - s_{k-1}": opinion.clamp(0, 1), "M^_k": estimate.clamp(0, 1)}


def result_path(out: Path, job: tuple) -> Path:
    return out / "{}_{}_{}_{}.json".format(*job)


def run_jobs(out: Path, jobs: list[tuple]):
    """Run the jobs that are free, then wait for the others."""
    for job in jobs:
        path = result_path(out, job)
        lock = path.with_suffix(".lock")
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        try:
            if not path.exists():
                result = {"job": job, "commit": git_commit(), **train_variant(out, *job)}
                with replacing(path) as beside:
                    beside.write_text(json.dumps(result))
                dice = np.mean([row[0] for row in result["held_out_images"]])
                print(*job, f"held-out Dice {dice:.4f}", f"{result['seconds']} s", flush=True)
        finally:
            lock.unlink()
    # A killed process leaves its lock behind; remove it by hand.
    while not all(result_path(out, job).exists() for job in jobs):
        time.sleep(5)


def tuning_jobs(labels: int) -> list[tuple]:
    seeds = range(TUNING_SEEDS[labels])
    return [(name, labels, seed, lr) for name in FAMILIES for lr in LEARNING_RATES for seed in seeds]


def read_result(out: Path, job: tuple) -> dict:
    return json.loads(result_path(out, job).read_text())


def tuned(out: Path, labels: int) -> dict[str, dict[float, float]]:
    """Return the mean held-out Dice by family and learning rate."""
    found = {}
    for job in tuning_jobs(labels):
        dice = np.mean([row[0] for row in read_result(out, job)["held_out_images"]])
        found.setdefault(job[0], {}).setdefault(job[3], []).append(dice)
    return {family: {rate: np.mean(dice) for rate, dice in rates.items()} for family, rates in found.items()}


def family_of(name: str) -> str:
    """Return the variant whose learning rate another one takes."""
    return "plain" if name.startswith("plain") else name if name in FAMILIES else "share"


def final_jobs(out: Path, labels: int) -> list[tuple]:
    rates = {family: max(rates, key=rates.get) for family, rates in tuned(out, labels).items()}
    return [(name, labels, seed, rates[family_of(name)]) for seed in range(LABELS[labels][1]) for name in ROWS[labels]]


def print_tables(out: Path, against: str, part: str):
    """Print learning rates, scores with paired differences, and Brier scores."""
    for labels in LABELS:
        if not all(result_path(out, job).exists() for job in tuning_jobs(labels)):
            print(f"{labels} labelled images: learning rates are not tuned yet")
            continue
        for family, rates in tuned(out, labels).items():
            text = ", ".join(f"{rate:g} {dice:.4f}" for rate, dice in rates.items())
            print(f"{labels} labelled images, held-out Dice of {family} by learning rate: {text}")
        results, missing = read_results(out, labels)
        print(f"{len(missing)} runs are missing\n")
        if part == "validation" and missing:
            raise SystemExit("the validation images are scored once, when no run is missing")
        for rows in (score_rows(results, part, against), brier_rows(results)):
            print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]) + "\n")


def read_results(out: Path, labels: int) -> tuple[dict[str, dict[int, dict]], list[tuple]]:
    """Return the results by variant and seed, and the jobs without one."""
    results, missing = {name: {} for name in VARIANTS}, []
    for job in final_jobs(out, labels):
        if result_path(out, job).exists():
            results[job[0]][job[2]] = read_result(out, job)
        else:
            missing.append(job)
    return {name: found for name, found in results.items() if found}, missing


def score_rows(results: dict[str, dict[int, dict]], part: str, against: str) -> list[dict[str, str]]:
    """Return means of each variant, and its difference of Dice to another.

    The first interval is Student's over the seeds, the second is over the images.
    """
    rows = []
    other = results.get(against, {})
    for name, mine in results.items():
        images = np.array([one[f"{part}_images"] for one in mine.values()])  # (seeds, images, scores)
        first = next(iter(mine.values()))
        row = {
            "variant": VARIANTS[name][0],
            "parameters": f"{first['parameters'] / 1e6:.2f} M",
            "multiply-adds": f"{first['multiply_adds'] / 1e9:.2f} G",
        }
        row |= {title: f"{value:.3f}" for title, value in zip(SCORES.values(), images.mean(axis=(0, 1)), strict=True)}
        row |= {"seeds": str(len(mine)), "difference of Dice": "", "over images": ""}
        seeds = [seed for seed in mine if seed in other]
        if name != against and len(seeds) > 1:
            change = np.array(
                [np.subtract(mine[seed][f"{part}_images"], other[seed][f"{part}_images"])[:, 0] for seed in seeds]
            )
            by_seed, by_image = change.mean(axis=1), change.mean(axis=0)
            half = stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(by_seed)
            row["difference of Dice"] = f"{by_seed.mean():+.3f} ± {half:.3f}"
            row["over images"] = f"± {1.96 * stats.sem(by_image):.3f}"
        rows.append(row)
    return rows


def brier_rows(results: dict[str, dict[int, dict]]) -> list[dict[str, str]]:
    """Return the Brier scores around each closed form, means over seeds."""
    rows = []
    for name, mine in results.items():
        briers = [one["held_out_stages"] for one in mine.values()]
        for k in sorted({key.split()[0] for key in briers[0]}):
            row = {"variant": VARIANTS[name][0], "k": k}
            for title in ("M_{k-1}", "1 - s_{k-1}", "M^_k", "M_k"):
                row[title] = f"{np.mean([one[f'{k} {title}'] for one in briers]):.4f}"
            rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cache", "run", "table"])
    parser.add_argument("--data", help="Kvasir-SEG as unconceal prepare writes it, for cache")
    parser.add_argument("--out", type=Path, required=True, help="folder of features and results")
    parser.add_argument(
        "--validation", action="store_true", help="table: score the validation images, once, at the end"
    )
    parser.add_argument("--against", choices=VARIANTS, default="plain", help="variant that table compares with")
    args = parser.parse_args()
    keep_freed_memory()
    if args.what == "cache":
        cache_features(args.data, args.out)
    elif args.what == "run":
        for labels in LABELS:
            run_jobs(args.out, tuning_jobs(labels))
            run_jobs(args.out, final_jobs(args.out, labels))
    else:
        print_tables(args.out, args.against, "validation" if args.validation else "held_out")


if __name__ == "__main__":
    main()
