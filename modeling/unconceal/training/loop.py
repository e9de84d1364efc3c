"""The training loop: phases, epochs, steps, evaluation, checkpoints, resume."""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, gather_object, send_to_device, set_seed
from datasets import Dataset
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, get_scheduler
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, cached_file
from transformers.utils import logging as transformers_logging

from ..api import LOADING_ERRORS
from ..data.loading import load_splits, readable
from ..data.transforms import TrainingSet, TransformRecipe
from ..evaluation.base import Protocol
from ..evaluation.networks import evaluate_model
from ..evaluation.protocols import PROTOCOLS
from ..models import NETWORKS
from ..models.image_processing_unconceal import UnconcealImageProcessor
from ..utils.errors import UserError, one_line
from ..utils.files import is_hub_id, make_folder, replacing
from .checkpoints import STATE_FOLDER, Progress, read_progress, save_checkpoint
from .recipe import PhaseRecipe, Recipe, recipe_to_dict


logger = logging.getLogger(__name__)

OPTIMIZERS = {
    "sgd": lambda parameters, recipe: torch.optim.SGD(
        parameters, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    ),
    "adam": lambda parameters, recipe: torch.optim.Adam(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    ),
    "adamw": lambda parameters, recipe: torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    ),
}
RECORD = "recipe.yaml"
UNCHANGED = TransformRecipe(rotate90_probability=0, flip_probability=0)


@dataclass(frozen=True)
class Task:
    """What one phase is judged by.

    Args:
        evaluate: Takes model, processor, data set, accelerator and batch size and returns named numbers.
        metric: The number that chooses the best checkpoint.
        higher_is_better: Whether more of it is better.
    """

    evaluate: Callable[..., dict[str, float]]
    metric: str
    higher_is_better: bool

    def better(self, value: float, best: float | None) -> bool:
        """Whether `value` beats `best`."""
        return best is None or (value > best if self.higher_is_better else value < best)


def evaluate_segmentation(
    model, processor, dataset, accelerator, batch_size, num_workers, protocol: Protocol
) -> dict[str, float]:
    """Score the masks by a protocol with its default options."""
    rows = evaluate_model(
        model,
        processor,
        dataset,
        accelerator=accelerator,
        batch_size=batch_size,
        num_workers=num_workers,
        protocol=protocol,
        progress=False,
    )
    return protocol.summarize(rows)


@torch.inference_mode()
def evaluate_loss(model, processor, dataset, accelerator, batch_size, num_workers) -> dict[str, float]:
    """Return the loss, averaged over the samples. Each process takes every n-th batch."""
    starts = range(accelerator.process_index * batch_size, len(dataset), accelerator.num_processes * batch_size)
    batches = DataLoader(
        TrainingSet(dataset, processor, UNCHANGED, seed=0),
        batch_sampler=[range(start, min(start + batch_size, len(dataset))) for start in starts],
        num_workers=num_workers,
    )
    was_training = model.training
    model.eval()
    total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    for batch in readable(batches, "the data"):
        with accelerator.autocast():
            total += model(**send_to_device(batch, accelerator.device)).loss * len(batch["pixel_values"])
    model.train(was_training)
    return {"loss": accelerator.reduce(total).item() / len(dataset)}


def train(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> Path:
    """Run every phase of a recipe; return the folder of the last phase's best checkpoint.

    `recipe.output_dir` receives `recipe.yaml` and for each phase a folder with the checkpoints `best` and `last` and the
    trackers' logs. With `resume` a run goes on after its last finished epoch, as if it had never stopped.

    Raises:
        UserError: If the output folder holds another run, the data or a checkpoint cannot be used, or the loss is no
            longer finite.
    """
    transformers_logging.disable_progress_bar()
    # Accelerate takes several processes without an accelerator for one unless told that the CPU is meant.
    state = PartialState(cpu=not torch.accelerator.is_available())
    output_dir = Path(recipe.output_dir)
    # A checkpoint to start from makes the phases before it pointless.
    tasks = list(recipe.phases)
    given = [index for index, task in enumerate(tasks) if recipe.phases[task].init_from]
    tasks = tasks[given[-1] :] if given else tasks
    # Everything that can be refused is, before anything is written or removed.
    with state.main_process_first():
        if state.is_main_process:
            check_folder(output_dir, recipe, resume, overwrite)
        splits = load_splits(recipe.data.path, [recipe.data.train_split, recipe.data.eval_split])
        check_start(recipe, tasks[0], resume)
        if state.is_main_process:
            claim_folder(output_dir, recipe, resume)
    best = None
    for task in tasks:
        best = run_phase(recipe, task, splits, init_from=recipe.phases[task].init_from or best)
    state.destroy_process_group()
    return best


def check_folder(output_dir: Path, recipe: Recipe, resume: bool, overwrite: bool):
    """Refuse an output folder that cannot be written or that holds another run.

    Raises:
        UserError: For these reasons.
    """
    make_folder(output_dir)
    record = output_dir / RECORD
    if record.exists() and not (resume or overwrite):
        raise UserError(f"{output_dir} already holds a run; add --resume, --overwrite or output_dir=ANOTHER")
    if record.exists() and resume:
        # Over the defaults: a run from before a setting existed has its default.
        kept = OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.load(record))
        changed = sorted(_differences(OmegaConf.to_container(kept), recipe_to_dict(recipe)))
        if changed:
            raise UserError(
                f"the run in {output_dir} was started with another {', '.join(changed)}; "
                "resume it with the same recipe, or start anew with output_dir=ANOTHER"
            )


def claim_folder(output_dir: Path, recipe: Recipe, resume: bool):
    """Write the recipe into the folder of a new run, and remove what an earlier run left there."""
    record = output_dir / RECORD
    if record.exists():
        if resume:
            return
        for task in NETWORKS[recipe.network].tasks.keys() | OmegaConf.load(record).phases.keys():
            shutil.rmtree(output_dir / task, ignore_errors=True)
    with replacing(record) as beside:
        OmegaConf.save(OmegaConf.create(recipe_to_dict(recipe)), beside)


def check_start(recipe: Recipe, task: str, resume: bool):
    """Build the first phase's model and try it without computing, so that a mistake shows before the run begins.

    Raises:
        UserError: If recipe, checkpoint and encoder do not go together.
    """
    phase, model_class = recipe.phases[task], NETWORKS[recipe.network].tasks[task]
    processor, config = build_processor(recipe, phase.init_from), build_config(recipe, phase.init_from)
    color = (40, 120, 200)
    refused = (*LOADING_ERRORS, AssertionError)  # an encoder may not be installed, or not be able to do this
    try:
        with torch.device("meta"):
            model = model_class(config).eval()
    except refused as error:
        raise UserError(f"recipe: model: {one_line(error)}") from None
    try:
        pixel_values = processor(Image.new("RGB", (64, 64), color))["pixel_values"]
        model.check_pixel_values(pixel_values)
    except (ValueError, TypeError) as error:
        raise UserError(f"recipe: processor: {one_line(error)}") from None
    try:
        model(pixel_values.to("meta"))
    except refused as error:
        raise UserError(f"recipe: model: {one_line(error)}") from None
    if hasattr(model, "denormalize"):
        seen = model.denormalize(pixel_values).mean(dim=(0, 2, 3))
        if not torch.allclose(seen * 255, torch.tensor(color, dtype=seen.dtype), atol=0.5):
            raise UserError(
                "recipe: processor: the network cannot undo its normalisation; set image_mean and image_std in processor and "
                "model alike, and leave do_rescale and do_normalize on"
            )
    if phase.init_backbone_from and not resume:
        load_backbone(model_class(config), phase.init_backbone_from, warn=False)


def _differences(kept: Any, wanted: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted keys by which two recipes differ, as far as it changes the result."""
    free = ("output_dir", "data.num_workers", "trackers")
    if isinstance(kept, dict) and isinstance(wanted, dict):
        for name in kept.keys() | wanted.keys():
            yield from _differences(kept.get(name), wanted.get(name), f"{key}.{name}" if key else name)
    elif OmegaConf.create([kept]) != OmegaConf.create([wanted]) and key not in free:
        yield key


def build_config(recipe: Recipe, init_from: str | Path | None) -> PreTrainedConfig:
    """Return the network's configuration: the checkpoint's or the defaults, changed by `recipe.model`.

    Raises:
        UserError: If there is no such checkpoint, it is of another network, or the values do not fit together.
    """
    config_class = NETWORKS[recipe.network].config_class
    try:
        if init_from is None:
            return config_class(**recipe.model)
        if not Path(init_from).exists() and not is_hub_id(init_from):
            raise UserError(
                f"cannot start from {init_from}: there is no such folder, and a Hub id has the form owner/name"
            )
        kept = config_class.get_config_dict(init_from)[0]
        found = kept.get("model_type")
        if found != config_class.model_type:
            raise UserError(
                f"cannot start from {init_from}: it holds a network of type {found}, expected {config_class.model_type}"
            )
        # Not `from_pretrained`, which changes the fields after it has checked them.
        return config_class.from_dict({**kept, **recipe.model})
    except LOADING_ERRORS as error:
        where = "recipe: model" if init_from is None else f"cannot start from {init_from}"
        raise UserError(f"{where}: {one_line(error)}") from None


def build_processor(recipe: Recipe, init_from: str | Path | None) -> UnconcealImageProcessor:
    """Return the image processor: the checkpoint's or the defaults, changed by `recipe.processor`.

    Raises:
        UserError: If the values do not fit together.
    """
    try:
        if init_from is not None and has_processor(init_from):
            return UnconcealImageProcessor.from_pretrained(init_from, **recipe.processor)
        return UnconcealImageProcessor(**recipe.processor)
    except LOADING_ERRORS as error:
        raise UserError(f"recipe: processor: {one_line(error)}") from None


def has_processor(init_from: str | Path) -> bool:
    """Whether a checkpoint came with its image processor; published ones of others may not."""
    return cached_file(init_from, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False) is not None


def build_model(recipe: Recipe, task: str, init_from: str | Path | None) -> PreTrainedModel:
    """Build the model of a phase, from scratch or from a checkpoint.

    Raises:
        UserError: If the checkpoint is missing, damaged, of another network, or of other sizes.
    """
    config, model_class = build_config(recipe, init_from), NETWORKS[recipe.network].tasks[task]
    if init_from is None:
        return model_class(config)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of what is new in this phase alarms without cause
    try:
        model, report = model_class.from_pretrained(init_from, config=config, output_loading_info=True)
    except LOADING_ERRORS as error:
        raise UserError(f"cannot start from {init_from}: {one_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(level)
    if not set(model.state_dict()) - set(report["missing_keys"]):
        raise UserError(f"cannot start from {init_from}: it holds no weights of {model_class.__name__}")
    return model


def load_backbone(model: PreTrainedModel, source: str, warn: bool = True):
    """Give the encoder pretrained weights; where only the way to the Hub is missing, warn and leave it at random.

    Raises:
        UserError: If there are no such weights, or they are of another encoder.
    """
    try:
        on_hub = is_hub_id(source) and not Path(source).exists()
        if on_hub and cached_file(source, CONFIG_NAME, _raise_exceptions_for_connection_errors=False) is None:
            if warn and PartialState().is_main_process:
                logger.warning("cannot reach the Hub for %s: the encoder starts at random", source)
            return
        model.load_backbone(source)
    except LOADING_ERRORS as error:
        raise UserError(f"cannot start the encoder from {source}: {one_line(error)}") from None


def run_phase(
    recipe: Recipe,
    task_name: str,
    splits: dict[str, Dataset],
    init_from: str | Path | None,
) -> Path:
    """Train one phase from its last finished epoch; return the folder of its best checkpoint.

    Raises:
        UserError: If it cannot start, cannot be resumed as it is, or diverges.
    """
    phase = recipe.phases[task_name]
    protocol = PROTOCOLS[recipe.protocol]
    task = {
        "reconstruction": Task(evaluate_loss, "loss", higher_is_better=False),
        "segmentation": Task(
            partial(evaluate_segmentation, protocol=protocol),
            recipe.best_metric,
            higher_is_better=protocol.best_metrics[recipe.best_metric],
        ),
    }[task_name]
    folder = Path(recipe.output_dir) / task_name
    best, last = folder / "best", folder / "last"
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=phase.gradient_accumulation_steps,
        log_with=recipe.trackers or None,
        project_dir=recipe.output_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=recipe.seed),
    )
    with accelerator.main_process_first():
        progress = read_progress(last) or Progress(task_name, num_processes=accelerator.num_processes)
    if progress.num_processes != accelerator.num_processes:
        raise UserError(
            f"the run in {folder} was started with {progress.num_processes} processes, got {accelerator.num_processes}; "
            "resume it with as many"
        )
    if len(set(gather_object([progress.epoch]))) > 1:
        raise UserError(f"the processes see different checkpoints in {last}; it must lie on a disk that all share")
    if progress.epoch >= phase.epochs:
        accelerator.print(f"{task_name}: already finished, best {task.metric} {progress.best:.4f}")
        return best

    # 1. Model, data, optimizer, schedule.
    set_seed(recipe.seed)
    model = build_model(recipe, task_name, init_from)
    if phase.init_backbone_from and not progress.epoch:
        load_backbone(model, phase.init_backbone_from)
    processor = build_processor(recipe, init_from)
    samples = TrainingSet(splits[recipe.data.train_split], processor, recipe.data.transforms, recipe.seed)
    batches = DataLoader(samples, phase.batch_size, shuffle=True, num_workers=recipe.data.num_workers)
    model.train()
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    if phase.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[phase.optimizer.name](trainable, phase.optimizer)
    network = model
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    steps_per_epoch = math.ceil(len(batches) / phase.gradient_accumulation_steps)
    # Not prepared: Accelerate would step it once for every process.
    scheduler = make_scheduler(optimizer, phase, steps_per_epoch * phase.epochs)
    registered = [scheduler]
    averaged = None
    if phase.ema_decay is not None:
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(phase.ema_decay), use_buffers=True)
        registered.append(averaged)
    accelerator.register_for_checkpointing(*registered)
    if progress.epoch:
        accelerator.load_state(str(last / STATE_FOLDER))
        accelerator.print(f"{task_name}: resumed after epoch {progress.epoch}")
    accelerator.init_trackers(task_name, config=_flat(recipe_to_dict(recipe)))

    # 2. Epochs.
    for epoch in range(progress.epoch, phase.epochs):
        samples.set_epoch(epoch)
        batches.set_epoch(epoch)
        row = {"epoch": epoch + 1, "learning_rate": scheduler.get_last_lr()[0]}
        model.train()
        row |= train_epoch(recipe, phase, accelerator, model, optimizer, scheduler, batches, averaged, row["epoch"])
        progress.step += steps_per_epoch
        progress.epoch = epoch + 1
        kept = averaged.module if averaged is not None else network
        synchronize_buffers(kept)
        is_best = False
        if progress.epoch % phase.evaluate_every == 0 or progress.epoch == phase.epochs:
            measured = task.evaluate(
                kept,
                processor,
                splits[recipe.data.eval_split],
                accelerator,
                phase.batch_size,
                recipe.data.num_workers,
            )
            row |= {f"eval_{name}": value for name, value in measured.items()}
            is_best = task.better(measured[task.metric], progress.best)
            progress.best = measured[task.metric] if is_best else progress.best
        progress.history.append(row)
        accelerator.log({name: value for name, value in row.items() if name != "epoch"}, step=progress.step)
        accelerator.print(_report(task_name, row, phase.epochs, task.metric, is_best))
        if is_best:
            save_checkpoint(best, accelerator, kept, processor, progress, with_state=False)
        save_checkpoint(last, accelerator, kept, processor, progress, with_state=True)

    for tracker in accelerator.trackers:  # not `end_training`: that ends the group of processes too
        tracker.finish()
    return best


def train_epoch(
    recipe: Recipe,
    phase: PhaseRecipe,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer,
    scheduler,
    batches,
    averaged: AveragedModel | None,
    epoch: int,
) -> dict[str, float]:
    """Go through the training split once; return the mean loss, the seconds and how they were spent."""
    started, waited, losses, num_samples = time.perf_counter(), 0.0, [], 0
    bar = tqdm(
        total=len(batches),
        desc=f"epoch {epoch}/{phase.epochs}",
        unit="batch",
        leave=False,
        disable=not accelerator.is_local_main_process,
    )
    network = accelerator.unwrap_model(model)
    iterator = readable(batches, "the training data")
    while True:
        asked = time.perf_counter()
        batch = next(iterator, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        if recipe.channels_last:
            batch["pixel_values"] = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        if hasattr(network, "training_progress"):
            network.training_progress = (epoch - 1 + len(losses) / len(batches)) / phase.epochs
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and phase.max_grad_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), phase.max_grad_norm)
            optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                scheduler.step()
                if averaged is not None:
                    averaged.update_parameters(network)
            optimizer.zero_grad()
        losses.append(loss.detach())
        num_samples += len(batch["pixel_values"])
        bar.update()
    bar.close()
    mean_loss = accelerator.reduce(torch.stack(losses).float().mean(), "mean").item()
    if not math.isfinite(mean_loss):
        raise UserError(
            f"the loss is {mean_loss} in epoch {epoch}; lower phases.*.optimizer.learning_rate or set max_grad_norm "
            "(the checkpoint of the epoch before is kept)"
        )
    seconds = time.perf_counter() - started
    return {
        "train_loss": mean_loss,
        "seconds": seconds,
        "samples_per_second": num_samples * accelerator.num_processes / seconds,
        "data_wait_share": waited / seconds,
    }


def synchronize_buffers(model: nn.Module):
    """Give all processes the first one's batch-norm statistics: those are saved, so those must be evaluated."""
    if torch.distributed.is_initialized():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def make_scheduler(optimizer, phase: PhaseRecipe, num_steps: int):
    """Return the learning rate schedule over `num_steps` optimizer steps."""
    schedule = phase.schedule
    names = {"constant": "constant_with_warmup"}
    specific = {"power": schedule.power, "lr_end": 0.0} if schedule.name == "polynomial" else None
    return get_scheduler(
        names.get(schedule.name, schedule.name),
        optimizer,
        num_warmup_steps=schedule.warmup_steps,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=specific,
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dictionaries into one with dotted keys and values that trackers take."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


def _report(task: str, row: dict[str, Any], epochs: int, metric: str, is_best: bool) -> str:
    """One line about an epoch."""
    parts = [f"{task} epoch {row['epoch']}/{epochs}", f"loss {row['train_loss']:.4f}"]
    if f"eval_{metric}" in row:
        parts.append(f"{metric} {row[f'eval_{metric}']:.4f}" + (" (best)" if is_best else ""))
    parts.append(f"{row['seconds']:.0f} s, {row['samples_per_second']:.1f} samples/s")
    parts.append(f"{row['data_wait_share']:.0%} waiting for data")
    return ", ".join(parts)
