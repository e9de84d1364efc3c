"""The networks that the page offers: which, and how they are loaded when somebody first asks for one."""

import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import gradio as gr
import torch
from transformers import Pipeline, pipeline


@dataclass(frozen=True)
class Task:
    """What a person looks for.

    Attributes:
        title: In the choice of networks.
        view: That a result opens in: "reveal", "overlay", "mask", "cutout" or "targets".
        examples: What files in `examples/` that show it are called, as a pattern.
    """

    title: str
    view: str
    examples: str = ""


# By the names that UNCONCEAL_MODELS gives to networks; other names are shown as they are.
TASKS = {
    "camouflaged": Task("Camouflaged object", "reveal", "camouflage-*"),
    "lesion": Task("Lesion or polyp", "overlay", "ultrasound-*"),
    "small-target": Task("Small target", "targets", "infrared-*"),
    "cut-out": Task("Fine cut-out", "cutout", "intricate-*"),
}
DEMO_RUNS = "demo/run-*/segmentation/best"  # what scripts/demo.sh leaves in the repository
HOW_TO_GET_ONE = (
    "no network to show: set UNCONCEAL_MODELS or --model to NAME=ID pairs, such as camouflaged=owner/run-cos or "
    "camouflaged=path/to/folder, or train a tiny one by scripts/demo.sh"
)


def task_of(name: str) -> Task:
    """Return the task of a network by its name."""
    return TASKS.get(name) or Task(name[:1].upper() + name[1:].replace("-", " "), "reveal")


def examples_of(name: str) -> list[Path]:
    """Return the example pictures of a network by its name."""
    pattern = task_of(name).examples
    return sorted((Path(__file__).parent / "examples").glob(pattern)) if pattern else []


def choose_sources(given: list[str]) -> dict[str, str]:
    """Return where the networks come from, by name.

    Args:
        given: NAME=ID, or ID alone for "camouflaged", where ID is a folder or OWNER/NAME[@REVISION] on the Hub. If there
            are none, the network of the last run of scripts/demo.sh is taken.

    Raises:
        ValueError: In one line, if there is none, or one cannot be.
    """
    sources = {}
    for pair in given:
        name, has_name, source = (part.strip() for part in pair.partition("="))
        if not has_name:
            name, source = "camouflaged", name
        if not (name and source):
            raise ValueError(f"got {pair!r} as a network, expected NAME=ID, such as camouflaged=owner/run-cos")
        if name in sources:
            raise ValueError(
                f"got two networks named {name}: {sources[name]} and {source}; give each a name of its own"
            )
        folder = Path(source).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ValueError(
                    f"got the folder {source} without config.json; give a folder that save_pretrained wrote"
                )
            source = str(folder)
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source):
            raise ValueError(
                f"got {source!r}, which is no folder and no id on the Hub, owner/name or owner/name@revision"
            )
        sources[name] = source
    if not sources:
        runs = sorted(Path(__file__).parent.parent.glob(DEMO_RUNS), key=lambda run: run.stat().st_mtime)
        if not runs:
            raise ValueError(HOW_TO_GET_ONE)
        sources = {"camouflaged": str(runs[-1])}
    return sources


def choose_device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    if torch.cuda.is_available():  # asked first: a ZeroGPU Space answers this alone
        return torch.device("cuda")
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


class Networks:
    """Networks by name, loaded when first asked for. At most `num_held` stay in memory: those used last.

    Attributes:
        sources: Folder or id of each, by name.
        device: That they run on: the accelerator where there is one.
    """

    def __init__(self, sources: dict[str, str], num_held: int):
        self.sources = sources
        self.device = choose_device()
        self._num_held = num_held
        self._held: OrderedDict[str, Pipeline] = OrderedDict()
        self._lock = Lock()

    def __getitem__(self, name: str) -> Pipeline:
        """Return the network's pipeline, a `SoftMaskPipeline`.

        Raises:
            gr.Error: If there is no such network, or it cannot be loaded.
        """
        if name not in self.sources:
            raise gr.Error(
                f"There is no such network here; there are {', '.join(self.sources)}.", print_exception=False
            )
        with self._lock:
            if name not in self._held:
                while len(self._held) >= self._num_held:
                    self._held.popitem(last=False)
                self._held[name] = self._load(self.sources[name])
            self._held.move_to_end(name)
            return self._held[name]

    def _load(self, source: str) -> Pipeline:
        model, _, revision = (source, "", "") if Path(source).is_dir() else source.partition("@")
        try:
            return pipeline(
                "soft-image-segmentation",
                model=model,
                revision=revision or None,
                device=self.device,
                trust_remote_code=True,  # the code comes from whoever set up this page
            )
        except Exception as error:  # nearly any class: files, network, code of the model
            print(f"cannot load {source}: {type(error).__name__}: {error}", flush=True)
            raise gr.Error(
                "This network cannot be loaded at the moment; the log says why.", print_exception=False
            ) from None

    def unfolds(self, name: str) -> bool:
        """Tell whether the network comes to its mask in stages that can be shown, as RUN does."""
        return hasattr(self[name].model.config, "num_stages")

    def describe(self, name: str) -> str:
        """Return what kind of network it is and, where it comes from the Hub, its id: paths are nobody's business."""
        kind = self[name].model.config.model_type.partition("_")[0].upper()
        source = self.sources[name]
        return kind if Path(source).is_dir() else f"{kind}, {source}"
