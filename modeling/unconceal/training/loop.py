"""The training loop: phases, epochs, steps, evaluation."""

import logging
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, gather_object, send_to_device, set_seed
from datasets import Dataset
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, get_scheduler
from transformers.utils import logging as transformers_logging

from ..data.cards import describe_set
from ..data.loading import readable
from ..data.masks import report_faint
from ..data.mixing import Mixture, join_sets
from ..data.streaming import Stream, StreamedTrainingSet
from ..data.transforms import TrainingSet, TransformRecipe
from ..evaluation.networks import evaluate_model
from ..evaluation.protocols import PROTOCOLS
from ..evaluation.workers import num_cores
from ..models.memory import keep_freed_memory
from ..models.networks import NETWORKS
from ..utils.commits import git_commit
from ..utils.errors import UserError, one_line, tells_lost_process
from ..utils.files import replacing
from ..utils.loading_errors import loading_explained
from ..utils.processes import obey_parent_only
from .checkpoints import STATE_FOLDER, WRITING_ERRORS, Progress, find_checkpoint, save_checkpoint
from .earlier_run import alone_in, bring_back, forget, holds_run
from .logs import EpochMeter, RunLog
from .recipe import OptimizerRecipe, PhaseRecipe, Recipe, ScheduleRecipe, flatten
from .report import write_report
from .saving import SaveSchedule, StopRequest, stop_on_signals
from .start import (
    build_config,
    build_processor,
    check_batch_norms,
    check_compiler,
    check_folder,
    check_masks,
    check_same_data,
    check_start,
    choose_precision,
    claim_folder,
    load_start,
    open_sets,
)


logger = logging.getLogger(__name__)

DIVERGED_FILE = "diverged_batch.pt"
UNCHANGED = TransformRecipe(rotate90_probability=0, flip_probability=0)


@torch.inference_mode()
def evaluate_loss(model, processor, dataset, accelerator, batch_size, num_workers) -> float:
    """Return the mean loss; each process takes every n-th batch."""
    batch_size = batch_size if processor.do_resize else 1
    starts = range(accelerator.process_index * batch_size, len(dataset), accelerator.num_processes * batch_size)
    batches = DataLoader(
        TrainingSet(dataset, processor, UNCHANGED, seed=0),
        batch_sampler=[range(start, min(start + batch_size, len(dataset))) for start in starts],
        num_workers=num_workers,
        worker_init_fn=_start_worker,
    )
    was_training = model.training
    model.eval()
    total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    for batch in readable(batches, "the data"):
        with accelerator.autocast():
            total += model(**send_to_device(batch, accelerator.device)).loss * len(batch["pixel_values"])
    model.train(was_training)
    return accelerator.reduce(total).item() / len(dataset)


def train(recipe: Recipe, resume: bool = False, overwrite: bool = False, command: str | None = None) -> Path:
    """Run every phase of a recipe; return the last phase's best checkpoint.

    `recipe.output_dir` receives `recipe.yaml` and a folder for each phase, with the checkpoints `best` and `last` and
    the trackers' logs. With several processes, call `PartialState().destroy_process_group()` at the end.

    Args:
        recipe: The recipe.
        resume: Go on from the last checkpoint, also within an epoch. The result equals that of an unbroken run.
        overwrite: Replace another run in the output folder. It stands aside until the new run has a checkpoint, and
            comes back if the new run fails before.
        command: Command line to keep in the record of the run.

    Raises:
        UserError: If the output folder holds another run, the data or a checkpoint cannot be used, or the loss is not
            finite, or another run trains in the output folder, or another process of this run ended.
        Stopped: If SIGTERM or Ctrl-C came; the run is saved first. A second signal ends it at once.
    """
    transformers_logging.disable_progress_bar()
    # Without this, Accelerate treats several processes without an accelerator as one.
    state = PartialState(cpu=not torch.accelerator.is_available())
    with alone_in(recipe.output_dir) if state.is_main_process else nullcontext(), stop_on_signals() as request:
        try:
            return run_phases(recipe, state, resume, overwrite, command, request)
        except RuntimeError as error:
            if state.num_processes == 1 or not tells_lost_process(error):
                raise
            raise UserError(
                f"another process of this run ended ({one_line(error)}); its own message says why, and --resume goes "
                "on from the last checkpoint"
            ) from error


def run_phases(
    recipe: Recipe, state: PartialState, resume: bool, overwrite: bool, command: str | None, request: StopRequest
) -> Path:
    """Check everything, then run the phases, as `train` says."""
    output_dir = Path(recipe.output_dir)
    resume = resume and holds_run(output_dir)
    # A phase that starts from a checkpoint does not need the phases before it.
    tasks = list(recipe.phases)
    given = [index for index, task in enumerate(tasks) if recipe.phases[task].init_from]
    tasks = tasks[given[-1] :] if given else tasks
    # Check everything before anything is written or removed.
    with state.main_process_first():
        precision = data = None
        if state.is_main_process:
            check_folder(output_dir, recipe, resume, overwrite)
            precision = choose_precision(recipe, resume, state.device)
        sets = open_sets(recipe.data)
        splits, mixture = join_sets(sets), None
        if recipe.data.weights:
            sizes = [len(one[recipe.data.train_split]) for one in sets]
            mixture = Mixture(sizes, recipe.data.weights, recipe.seed)
        if state.is_main_process:
            check_masks(splits, recipe.data, tasks)
            data = [describe_set(*one) for one in zip(recipe.data.paths, sets, strict=True)]
        for task in tasks:
            check_start(recipe, task, resume, splits)
        if recipe.compile:
            check_compiler(state.device)
        check_batch_norms(recipe, state)
    precision, data = broadcast_object_list([precision, data])
    recipe = replace(recipe, mixed_precision=precision)
    report_threads(state)
    report_processes(state)
    best = None
    try:
        if state.is_main_process:
            claim_folder(output_dir, recipe, resume)
        state.wait_for_everyone()
        for task in tasks:
            best = run_phase(
                recipe, task, splits, mixture, data, recipe.phases[task].init_from or best, command, request
            )
    except BaseException:
        if state.is_main_process:
            bring_back(output_dir)
        raise
    if state.is_main_process:
        write_report(recipe)
    return best


def make_accelerator(recipe: Recipe, phase: PhaseRecipe) -> Accelerator:
    """Return the accelerator of a phase."""
    AcceleratorState._reset_state()  # otherwise it would keep the precision of an earlier run of this process
    return Accelerator(
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=phase.gradient_accumulation_steps,
        log_with=recipe.trackers or None,
        project_dir=recipe.output_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=recipe.seed, non_blocking=True),
    )


@dataclass
class PhaseParts:
    """What one phase trains with.

    Attributes:
        network: The network itself, whose weights are saved.
        model: The network with the wrappers of Accelerate.
        batches: Loader of the training samples.
        optimizer: The optimizer.
        scheduler: The learning rate schedule.
        averaged: Running mean of the weights, if the recipe keeps one.
        steps_per_epoch: Optimizer steps in an epoch.
        frozen: Parameters that do not learn in the present epoch.
    """

    network: PreTrainedModel
    model: nn.Module
    batches: DataLoader
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    averaged: AveragedModel | None
    steps_per_epoch: int
    frozen: set[nn.Parameter] = field(default_factory=set)


def prepare_phase(
    recipe: Recipe, phase: PhaseRecipe, accelerator: Accelerator, network: PreTrainedModel, samples: TrainingSet
) -> PhaseParts:
    """Make loader, optimizer and schedule of a phase, and wrap the network."""
    options = {"num_workers": recipe.data.num_workers, "pin_memory": accelerator.device.type == "cuda"}
    if recipe.data.num_workers:
        # Started once: an epoch can be short, and a large process is slow to fork.
        options |= {"persistent_workers": True, "worker_init_fn": _start_worker}
    if isinstance(samples, StreamedTrainingSet):
        shares = samples.batches(phase.batch_size, accelerator.process_index, accelerator.num_processes)
        batches = DataLoader(samples, batch_sampler=shares, **options)
        # Each process has its own batches already.
        own = {"num_processes": 1, "process_index": 0, "put_on_device": True, "non_blocking": True}
        batches = prepare_data_loader(batches, accelerator.device, **own)
    else:
        # Batch normalization can fail on a last batch of one.
        drop_last = len(samples) > phase.batch_size and len(samples) % phase.batch_size == 1
        batches = accelerator.prepare(
            DataLoader(samples, phase.batch_size, shuffle=True, drop_last=drop_last, **options)
        )
    if recipe.sync_batch_norm and accelerator.num_processes > 1:
        share_statistics(network)
    network.train()
    if recipe.channels_last:
        network.to(memory_format=torch.channels_last)
    if phase.gradient_checkpointing:
        network.activation_checkpointing_enable()
    optimizer = make_optimizer(network, phase.optimizer, accelerator.device, accelerator.scaler is not None)
    model, optimizer = accelerator.prepare(network, optimizer)
    steps_per_epoch = math.ceil(len(batches) / phase.gradient_accumulation_steps)
    # Not prepared, because Accelerate would step it once for every process.
    scheduler = make_scheduler(optimizer, phase.schedule, steps_per_epoch * phase.epochs)
    accelerator.register_for_checkpointing(scheduler)
    averaged = None
    if phase.ema_decay is not None:

        def average(averaged, current, steps):
            # The decay rises, as in timm: the first weights are poor.
            steps = int(steps)
            get_ema_multi_avg_fn(min(phase.ema_decay, (1 + steps) / (10 + steps)))(averaged, current, steps)

        averaged = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
        accelerator.register_for_checkpointing(averaged)
    if recipe.compile:
        network.compile()  # unlike a wrapper, it keeps the names of the weights
    return PhaseParts(network, model, batches, optimizer, scheduler, averaged, steps_per_epoch)


def share_statistics(network: PreTrainedModel):
    """Let the batch norms that learn normalize over all processes."""
    for name, part in network.named_children():
        if any(parameter.requires_grad for parameter in part.parameters()):
            setattr(network, name, nn.SyncBatchNorm.convert_sync_batchnorm(part))


def _start_worker(_):
    keep_freed_memory()
    obey_parent_only()


def run_phase(
    recipe: Recipe,
    task: str,
    splits: dict[str, Dataset],
    mixture: Mixture | None,
    data: list[dict[str, Any]],
    init_from: str | Path | None,
    command: str | None,
    request: StopRequest,
) -> Path:
    """Train a phase from its last checkpoint; return its best one.

    Raises:
        UserError: If it cannot start, cannot be resumed, or diverges.
    """
    phase = recipe.phases[task]
    protocol = PROTOCOLS[recipe.protocol]
    metric, higher_is_better = "loss", False
    if task == "segmentation":
        metric, higher_is_better = recipe.best_metric, protocol.best_metrics[recipe.best_metric]
    folder = Path(recipe.output_dir) / task
    best, last = folder / "best", folder / "last"
    accelerator = make_accelerator(recipe, phase)
    with accelerator.main_process_first():
        found = find_checkpoint(last, recipe.total_limit)
    saved, progress = found or (last, Progress(task, num_processes=accelerator.num_processes))
    if progress.num_processes != accelerator.num_processes:
        raise UserError(
            f"the run in {folder} was started with {progress.num_processes} processes, "
            f"got {accelerator.num_processes}; resume it with the same number"
        )
    check_same_data(progress.data, data, recipe.output_dir)
    if len(set(gather_object([(progress.epoch, progress.batches)]))) > 1:
        raise UserError(f"the processes see different checkpoints in {last}; use an output_dir that all of them share")
    if progress.epoch >= phase.epochs:
        accelerator.print(f"{task}: already finished, best {metric} {progress.best:.4f}")
        return best

    # 1. Model, data, optimizer, schedule.
    set_seed(recipe.seed)
    if found:
        # A resumed phase keeps its network, even if defaults have changed. Its weights come with its other state.
        network = NETWORKS[recipe.network].tasks[task](build_config(recipe, saved))
    else:
        network, progress.start = load_start(recipe, task, init_from)
    progress.recipe = asdict(recipe)
    paths = {one["path"] for one in data}
    progress.data = [one for one in progress.data if one["path"] not in paths] + data
    progress.sessions.append({**describe_session(command), "mixed_precision": accelerator.mixed_precision})
    processor = build_processor(recipe, init_from)
    rows, limit = splits[recipe.data.train_split], recipe.data.max_unreadable
    given = (processor, recipe.data.transforms, recipe.seed)
    if isinstance(rows, Stream):
        samples = StreamedTrainingSet(rows, *given, limit, recipe.data.shuffle_buffer)
    else:
        samples = TrainingSet(rows, *given, mixture, limit)
    parts = prepare_phase(recipe, phase, accelerator, network, samples)
    if found:
        with loading_explained(f"cannot resume from {saved}", "if its files are whole"):
            accelerator.load_state(str(saved / STATE_FOLDER))
        inside = f" and {progress.batches} batches" if progress.batches else ""
        accelerator.print(f"{task}: resumed after epoch {progress.epoch}{inside}")
    schedule = SaveSchedule(recipe.save_every, request, accelerator)

    def save(name: str):
        kept = parts.averaged.module if parts.averaged is not None else network
        synchronize_buffers(kept)
        if not all(weight.isfinite().all() for weight in network.state_dict().values()):
            raise UserError(
                f"the weights are not finite in epoch {progress.epoch + 1}; lower phases.*.optimizer.learning_rate or "
                "set max_grad_norm (the checkpoint before is kept)"
            )
        is_last = name == "last"
        limit = recipe.total_limit if is_last else 1
        save_checkpoint(folder / name, accelerator, kept, processor, progress, is_last, limit)
        if is_last and accelerator.is_main_process:
            forget(Path(recipe.output_dir))

    settings = flatten(asdict(recipe)).items()  # trackers accept simple values only
    config = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings}
    accelerator.init_trackers(task, config=config)
    log = RunLog(folder, accelerator, progress.step)

    # 2. Epochs.
    faint = set()
    for epoch in range(progress.epoch, phase.epochs):
        samples.set_epoch(epoch)
        parts.batches.set_epoch(epoch)
        if not progress.batches:
            progress.epoch_rate = parts.scheduler.get_last_lr()[0]
        row = {"epoch": epoch + 1, "learning_rate": progress.epoch_rate}
        parts.model.train()
        parts.frozen = freeze_encoder(network, phase, epoch)
        row |= train_epoch(recipe, phase, accelerator, parts, progress, schedule, log, lambda: save("last"))
        progress.epoch, progress.step = epoch + 1, (epoch + 1) * parts.steps_per_epoch
        progress.batches, progress.batch_losses, progress.batch_terms, progress.batch_seconds = 0, [], [], (0.0, 0.0)
        report_unreadable(samples, accelerator, progress)
        if task == "segmentation":
            report_faint_masks(samples, accelerator, faint)
        kept = parts.averaged.module if parts.averaged is not None else network
        synchronize_buffers(kept)
        is_best, began = False, time.perf_counter()
        if progress.epoch % phase.evaluate_every == 0 or progress.epoch == phase.epochs:
            given = (kept, processor, splits[recipe.data.eval_split])
            options = {"batch_size": phase.batch_size, "num_workers": recipe.data.num_workers}
            if task == "segmentation":
                dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
                options |= {"accelerator": accelerator, "protocol": protocol, "dtype": dtype, "progress": False}
                measured = protocol.summarize(evaluate_model(*given, **options))
                log.draw_samples(progress.step, *given, dtype)
            else:
                measured = {"loss": evaluate_loss(*given, accelerator, **options)}
            row |= {f"eval_{name}": value for name, value in measured.items()}
            value = measured[metric]
            is_best = progress.best is None or (value > progress.best if higher_is_better else value < progress.best)
            progress.best = value if is_best else progress.best
        row["total_seconds"] = row["seconds"] + time.perf_counter() - began  # with the evaluation
        progress.history.append(row)
        log.write("epoch", progress.step, row)
        accelerator.print(_report(task, row, progress.history, phase.epochs, metric, is_best))
        if is_best:
            save("best")
        save("last")
        schedule.saved()

    for tracker in accelerator.trackers:  # `end_training` would also end the process group, which later phases need
        tracker.finish()
    return best


def describe_session(command: str | None) -> dict[str, Any]:
    """Return command, commit, date and machine of this process."""
    from ..evaluation.cost import machine  # slow to import

    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"command": command, "git_commit": git_commit(), "date": date, **machine()}


def train_epoch(
    recipe: Recipe,
    phase: PhaseRecipe,
    accelerator: Accelerator,
    parts: PhaseParts,
    progress: Progress,
    schedule: SaveSchedule,
    log: RunLog | None,
    save: Callable[[], None],
) -> dict[str, Any]:
    """Train on the split once, or on what is left of it.

    Returns the mean losses and the times of the whole epoch.
    """
    epoch, done, group = progress.epoch + 1, progress.batches, phase.gradient_accumulation_steps
    meter = EpochMeter(accelerator, progress, len(parts.batches), phase.epochs)
    losses = meter.losses
    batches = skip_first_batches(parts.batches, done) if done else parts.batches
    iterator, random_state = readable(batches, "the training data"), torch.get_rng_state()
    while True:
        asked = time.perf_counter()
        batch = next(iterator, None)
        waited = time.perf_counter() - asked
        if batch is None:
            meter.waited += waited
            break
        if len(losses) == done:
            torch.set_rng_state(random_state)  # a loader draws a number when it starts its processes
        if recipe.channels_last:
            batch["pixel_values"] = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        parts.network.training_progress = (epoch - 1 + len(losses) / len(parts.batches)) / phase.epochs
        # The last group of an epoch may have fewer batches; the mean is over those.
        size = min(group, len(parts.batches) - len(losses) // group * group)
        loss, terms = train_step(phase, accelerator, parts, batch, weight=group / size)
        rate = parts.scheduler.get_last_lr()[0]
        meter.add(loss, terms, len(batch["pixel_values"]), waited, rate)
        if not losses[-1].isfinite():
            place = Path(recipe.output_dir) / DIVERGED_FILE if log else None  # a trial writes nothing
            raise UserError(describe_divergence(losses[-1].item(), batch, parts, epoch, len(losses), place))
        step = progress.epoch * parts.steps_per_epoch + math.ceil(len(losses) / group)
        if log and len(losses) % recipe.log_every == 0:
            place = epoch - 1 + len(losses) / len(parts.batches)
            log.write("steps", step, {"epoch": place, **meter.close_window(rate)})
        if accelerator.sync_gradients and len(losses) < len(parts.batches) and schedule.is_due():
            progress.step = step
            meter.keep(progress)
            save()
            schedule.saved()
    compiled = {"first_step_seconds": meter.first_step} if recipe.compile else {}
    return {**meter.close(), **compiled}


def describe_divergence(
    loss: float, batch: dict, parts: PhaseParts, epoch: int, number: int, place: Path | None
) -> str:
    """Save the batch whose loss is not finite; return what to say."""
    parts.batches.set_epoch(epoch - 1)
    names = parts.batches.dataset.batch_names(parts.batches.batch_sampler, number - 1)
    saved = ""
    if place:
        with suppress(UserError, *WRITING_ERRORS):  # a full disk must not hide the error
            with replacing(place) as beside:
                torch.save({**{name: values.cpu() for name, values in batch.items()}, "ids": names}, beside)
            saved = f", saved in {place}"
    return (
        f"the loss is {loss} in epoch {epoch}, batch {number} ({', '.join(names)}{saved}); lower "
        "phases.*.optimizer.learning_rate or set max_grad_norm (the checkpoint before is kept)"
    )


def report_unreadable(samples: TrainingSet, accelerator: Accelerator, progress: Progress):
    """Name the images that this epoch was the first to find unreadable."""
    names = dict.fromkeys(gather_object(samples.unreadable_names()))
    new = [name for name in names if name not in progress.unreadable]
    progress.unreadable += new
    if new and accelerator.is_main_process:
        logger.warning(
            "%d of %d training images cannot be read, and the next takes their place: %s",
            *(len(progress.unreadable), len(samples), ", ".join(new)),
        )


def report_faint_masks(samples: TrainingSet, accelerator: Accelerator, named: set[str]):
    """Name the masks without an object that are not yet in `named`."""
    new = [name for name in dict.fromkeys(gather_object(samples.faint_names())) if name not in named]
    named.update(new)
    if accelerator.is_main_process:
        report_faint(new, "training masks")


def train_step(
    phase: PhaseRecipe, accelerator: Accelerator, parts: PhaseParts, batch: dict, weight: float = 1.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Train on one batch with weighted gradients; return loss and terms."""
    with accelerator.accumulate(parts.model):
        output = parts.model(**batch)
        loss = output.loss
        accelerator.backward(loss if weight == 1 else weight * loss)
        for parameter in parts.frozen:
            parameter.grad = None
        if accelerator.sync_gradients and phase.max_grad_norm is not None:
            accelerator.clip_grad_norm_(parts.model.parameters(), phase.max_grad_norm)
        parts.optimizer.step()
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            parts.scheduler.step()
            if parts.averaged is not None:
                parts.averaged.update_parameters(parts.network)
        parts.optimizer.zero_grad()
    return loss.detach(), output.get("loss_dict") or {}


def synchronize_buffers(model: nn.Module):
    """Copy the first process's batch-norm statistics to all, because those are saved."""
    if torch.distributed.is_initialized():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def report_threads(state: PartialState):
    """Say so if a CPU computes on only some cores."""
    threads = torch.get_num_threads()
    cores = num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if state.device.type == "cpu" and threads < cores:
        state.print(
            f"computing on {threads} of {cores} cores; OMP_NUM_THREADS={cores} uses all (accelerate launch and "
            "torchrun set it to 1)"
        )


def report_processes(state: PartialState):
    """Say so if `accelerate launch` started one process instead of several.

    On a CPU, `accelerate launch` needs MPI for several processes, and does not say so.
    """
    with suppress(psutil.Error, AttributeError):  # the parent may be gone, or somebody else's
        found = re.search(r"--num[_-]processes[ =](\d+)", " ".join(psutil.Process().parent().cmdline()))
        if found and state.num_processes == 1 < int(found[1]):
            logger.warning(
                "one process trains, not %s: on a CPU, start them with torchrun --nproc-per-node %s",
                *found.groups() * 2,
            )


def freeze_encoder(network: PreTrainedModel, phase: PhaseRecipe, epoch: int) -> set[nn.Parameter]:
    """Freeze what the recipe freezes in an epoch, counted from 0.

    Call it after `train()`. Returns the frozen parameters.
    """
    if not network.has_backbone:
        return set()
    encoder = network.backbone
    frozen = set(encoder.parameters()) if epoch < phase.freeze_encoder_epochs else set()
    encoder.train(not frozen)
    if epoch < phase.freeze_norms_epochs:
        for norm in (module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
            norm.eval()
            frozen.update(norm.parameters())
    if not torch.distributed.is_initialized():  # DistributedDataParallel waits for the gradients of all parameters
        for parameter in encoder.parameters():
            parameter.requires_grad_(parameter not in frozen)
    return frozen


def make_optimizer(
    network: PreTrainedModel, recipe: OptimizerRecipe, device: torch.device, scales_loss: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe, fused where torch can.

    The second group of parameters is the encoder, if it has another learning rate.
    """
    # With a scaled loss (fp16), a fused optimizer does not tell Accelerate that it skipped a step.
    fused = device.type in ("cpu", "cuda") and not scales_loss
    trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    encoder = []
    if recipe.encoder_lr_ratio != 1:
        encoder = [trainable.pop(name) for name in list(trainable) if name.startswith("backbone.")]
    groups = [{"params": list(trainable.values())}]
    if encoder:
        groups.append({"params": encoder, "lr": recipe.encoder_lr_ratio * recipe.learning_rate})
    options = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay, "fused": fused}
    if recipe.name == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.name](groups, **options)


def make_scheduler(optimizer, schedule: ScheduleRecipe, num_steps: int):
    """Return the learning rate schedule over `num_steps` optimizer steps."""
    name = "constant_with_warmup" if schedule.name == "constant" else schedule.name
    specific = {"power": schedule.power, "lr_end": 0.0} if name == "polynomial" else None
    num_steps = max(num_steps, schedule.warmup_steps + 1)  # polynomial divides by the steps that are left
    return get_scheduler(name, optimizer, schedule.warmup_steps, num_steps, specific)


def _report(
    task: str, row: dict[str, Any], history: list[dict[str, Any]], epochs: int, metric: str, is_best: bool
) -> str:
    """Describe an epoch in one line."""
    parts = [f"{task} epoch {row['epoch']}/{epochs}", f"loss {row['train_loss']:.4f}"]
    if f"eval_{metric}" in row:
        parts.append(f"{metric} {row[f'eval_{metric}']:.4f}" + (" (best)" if is_best else ""))
    parts.append(f"{row['seconds']:.0f} s, {row['samples_per_second']:.1f} samples/s")
    parts.append(f"{row['data_wait_share']:.0%} waiting for data")
    if "first_step_seconds" in row:
        parts.append(f"first step {row['first_step_seconds']:.0f} s (compiling)")
    seconds = sum(each["total_seconds"] for each in history) / len(history) * (epochs - len(history))
    if seconds:
        parts.append(f"about {timedelta(seconds=round(seconds))} left")
    return ", ".join(parts)
