"""Tell how a run goes: bar, log file, trackers, sample images."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.loading import read_pair
from ..data.masks import is_object
from ..models.inference import make_inference_form
from ..models.predict import predict_masks
from ..utils.errors import UserError, one_line
from ..utils.files import replacing
from .checkpoints import LOG_FILE, SAMPLES_FILE, Progress


logger = logging.getLogger(__name__)

NUM_SAMPLES = 4
REFRESH_SECONDS = 1.0  # between two texts beside the bar: each waits for the accelerator
NUM_SHOWN = 20  # batches whose mean loss the bar shows


class RunLog:
    """Log of a phase: lines of JSON in `log.jsonl`, and the trackers.

    A full disk ends the log, not the run.

    Args:
        folder: Folder of the phase.
        accelerator: The processes. The main one writes.
        step: Finished steps. Lines of later steps are removed, because a resumed run writes them again.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, step: int):
        self.accelerator, self.path = accelerator, folder / LOG_FILE
        self.failed: set[str | Path] = set()
        if accelerator.is_main_process and self.path.exists():
            lines = [json.dumps(row) + "\n" for row in read_log(folder) if row.get("step", 0) <= step]
            with self._writing(self.path), replacing(self.path) as beside:
                beside.write_text("".join(lines), encoding="utf-8")

    def write(self, kind: str, step: int, row: Mapping[str, Any]):
        """Write a row of numbers.

        Args:
            kind: "steps" for some steps within an epoch, or "epoch". Trackers get the former as `steps/NAME`.
            step: Finished optimizer steps.
            row: Numbers by name, or such dictionaries.
        """
        if not self.accelerator.is_main_process:
            return
        prefix = "steps/" if kind == "steps" else ""
        numbers = {f"{prefix}{name}": value for name, value in _flat(row) if not name.endswith("epoch")}
        line = {"kind": kind, "step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), **row}
        with self._writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        with self._writing("the trackers' logs"):
            self.accelerator.log(numbers, step=step)

    @contextmanager
    def _writing(self, what: str | Path) -> Iterator[None]:
        """Name once what cannot be written, and go on."""
        try:
            yield
        except (OSError, UserError) as error:
            if what not in self.failed:
                logger.warning("cannot write %s: %s; training goes on", what, one_line(error))
            self.failed.add(what)

    def draw_samples(self, step: int, network: nn.Module, processor: Any, rows: Dataset, dtype: torch.dtype | None):
        """Draw predictions for a few images, in `samples.png` and for the trackers.

        Args:
            step: Finished optimizer steps.
            network: A network that segments.
            processor: Its image processor.
            rows: Samples with `image`, `mask` and `id`.
            dtype: Type of the arithmetic; None is the network's.
        """
        if not self.accelerator.is_main_process:
            return
        from ..drawing.sheets import ScoredImage, draw_sheet  # slow to import

        def samples() -> Iterator[ScoredImage]:
            form = make_inference_form(network, dtype)
            for index in np.linspace(0, len(rows) - 1, min(NUM_SAMPLES, len(rows))).round().astype(int).tolist():
                row, image, mask = read_pair(rows, index)
                pixel_values = processor(images=[image], return_tensors="pt")["pixel_values"]
                pixel_values = pixel_values.to(form.device, form.dtype)
                size = image.height, image.width
                (probs,) = predict_masks(form, processor, [size], pixel_values, "never")
                yield ScoredImage(row["id"], "", image, is_object(mask), probs.cpu().numpy())

        sheet, file = draw_sheet(samples(), f"after {step} steps"), self.path.with_name(SAMPLES_FILE)
        with self._writing(file), replacing(file) as beside:
            sheet.save(beside)
        with self._writing("the trackers' logs"):
            for tracker in self.accelerator.trackers:  # other trackers take images in other forms
                if tracker.name == "tensorboard":
                    tracker.log_images({"samples": np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images({"samples": [sheet]}, step=step)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a phase's log; skip broken lines."""
    path, rows = folder / LOG_FILE, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


class EpochMeter:
    """Losses and times of an epoch, shown on a progress bar.

    Args:
        accelerator: The processes. The numbers of a window are those of this process.
        progress: Says what was done before a resume.
        num_batches: Batches of the epoch.
        num_epochs: Epochs of the phase.

    Attributes:
        losses: Loss of each batch, also of those before a resume.
    """

    def __init__(self, accelerator: Accelerator, progress: Progress, num_batches: int, num_epochs: int):
        from ..evaluation.cost import peak_bytes  # slow to import

        self.accelerator, self.peak_bytes = accelerator, peak_bytes
        done, rank = progress.batches, accelerator.process_index
        before = progress.batch_losses[rank] if done else []
        self.losses = list(torch.tensor(before, device=accelerator.device))
        self.names = list(progress.batch_terms[rank]) if done and progress.batch_terms else []
        sums = list(progress.batch_terms[rank].values()) if self.names else []
        self.sums = torch.tensor(sums, device=accelerator.device)
        self.seconds_before, self.waited_before = progress.batch_seconds
        self.started, self.waited, self.num_samples, self.first_step = time.perf_counter(), 0.0, 0, 0.0
        self.shown = 0.0
        self.bar = tqdm(
            total=num_batches,
            initial=done,
            desc=f"epoch {progress.epoch + 1}/{num_epochs}",
            unit="batch",
            leave=False,
            disable=None if accelerator.is_local_main_process else True,  # None: only in a terminal
        )
        self._open_window()

    def _open_window(self):
        self.window_started, self.window_first = time.perf_counter(), len(self.losses)
        self.window_samples, self.window_waited = self.num_samples, self.waited
        self.window_sums = torch.zeros_like(self.sums)

    def add(self, loss: Tensor, terms: Mapping[str, Tensor], num_samples: int, waited: float, rate: float):
        """Count a batch.

        Args:
            loss: Its loss.
            terms: The terms of its loss by name.
            num_samples: Its samples.
            waited: Seconds that it was waited for.
            rate: The learning rate, for the bar.
        """
        self.losses.append(loss)
        self.first_step = self.first_step or time.perf_counter() - self.started
        self.num_samples += num_samples
        self.waited += waited
        if terms:
            values = torch.stack([term.float() for term in terms.values()])
            if not self.names:
                self.names = list(terms)
                self.sums = self.window_sums = torch.zeros_like(values)
            self.sums, self.window_sums = self.sums + values, self.window_sums + values
        if not self.bar.disable and time.perf_counter() - self.shown > REFRESH_SECONDS:
            self.shown = time.perf_counter()
            row = self.window(rate)
            self.bar.set_postfix_str(
                f"loss {torch.stack(self.losses[-NUM_SHOWN:]).float().mean():.4f}, rate {rate:.1e}, "
                f"{row['samples_per_second']:.3g} images/s, {row['data_wait_share']:.0%} waiting, "
                f"{row['memory_gib']:.1f} GiB",
                refresh=False,
            )
        self.bar.update()

    def window(self, rate: float) -> dict[str, float]:
        """Return learning rate, speed since the last row, and peak memory."""
        seconds = time.perf_counter() - self.window_started
        num_samples = self.num_samples - self.window_samples
        return {
            "learning_rate": rate,
            "samples_per_second": num_samples * self.accelerator.num_processes / seconds,
            "data_wait_share": (self.waited - self.window_waited) / seconds,
            "memory_gib": self.peak_bytes(self.accelerator.device.type) / 2**30,
        }

    def close_window(self, rate: float) -> dict[str, Any]:
        """Return the row of the batches since the last row."""
        losses = torch.stack(self.losses[self.window_first :]).float()
        means = (self.window_sums / len(losses)).tolist()
        row = {"loss": losses.mean().item(), "losses": dict(zip(self.names, means, strict=True)), **self.window(rate)}
        self._open_window()
        return row

    def keep(self, progress: Progress):
        """Write into the progress what a resume within the epoch needs."""
        progress.batches = len(self.losses)
        progress.batch_losses = gather_object([torch.stack(self.losses).float().tolist()])
        progress.batch_terms = gather_object([dict(zip(self.names, self.sums.tolist(), strict=True))])
        seconds = self.seconds_before + time.perf_counter() - self.started
        progress.batch_seconds = seconds, self.waited_before + self.waited

    def close(self) -> dict[str, Any]:
        """Remove the bar; return means and times of the epoch."""
        self.bar.close()
        loss = torch.stack(self.losses).float().mean()
        means = torch.cat([loss[None], self.sums / len(self.losses)])
        loss, *terms = self.accelerator.reduce(means, "mean").tolist()
        seconds = time.perf_counter() - self.started
        total, waited = self.seconds_before + seconds, self.waited_before + self.waited
        return {
            "train_loss": loss,
            "losses": dict(zip(self.names, terms, strict=True)),
            "seconds": total,
            "samples_per_second": self.num_samples * self.accelerator.num_processes / seconds,
            "data_wait_share": waited / total,
        }


__all__ = ["EpochMeter", "RunLog", "read_log"]
