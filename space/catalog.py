"""Offer networks by name and load each on first use."""

import re
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import gradio as gr
import torch
from transformers import Pipeline, pipeline


class Use(NamedTuple):
    """Describe what a visitor looks for."""

    title: str
    view: str  # of the first result: "reveal", "overlay", "mask", "cutout" or "targets"
    examples: str = ""  # file name pattern in `examples/`


# Keyed by the names in UNCONCEAL_MODELS, and by those of networks that ship with unconceal. Any other name is shown as
# it is.
USES = {
    "polyp": Use("Polyp", "overlay", "polyp-*"),
    "defect": Use("Defect on a magnetic tile", "overlay", "defect-*"),
    "camouflage": Use("Hidden object", "reveal", "camouflage-*"),
    "camouflaged": Use("Camouflaged object", "reveal", "camouflage-*"),
    "lesion": Use("Lesion in ultrasound", "overlay", "ultrasound-*"),
    "small-target": Use("Small target in infrared", "targets", "infrared-*"),
    "cut-out": Use("Fine cut-out", "cutout", "intricate-*"),
    "demo": Use("Camouflaged object (tiny demo network)", "reveal", "camouflage-*"),
}
DEMO_RUNS = "demo/run-*/segmentation/best"  # written by scripts/demo.sh


def use_of(name: str) -> Use:
    """Return the use of a network by its name."""
    return USES.get(name) or Use(name[:1].upper() + name[1:].replace("-", " "), "reveal")


def examples_of(name: str) -> list[Path]:
    """Return the example images of a network by its name."""
    pattern = use_of(name).examples
    return sorted((Path(__file__).parent / "examples").glob(pattern)) if pattern else []


def choose_sources(pairs: list[str]) -> dict[str, str]:
    """Return the source of each network by name.

    Args:
        pairs: NAME=ID. A bare ID is named "camouflaged". ID is a folder, OWNER/NAME[@REVISION] on the Hub, or the
            name of a network that ships with an installed unconceal, which a bare ID keeps. By default all of
            these, and the network of the last run of scripts/demo.sh.

    Raises:
        ValueError: If a pair is wrong or there is no network.
    """
    sources = {}
    # Asked only if needed: importing unconceal takes seconds.
    shipped = shipped_sources() if not pairs or any("/" not in pair for pair in pairs) else {}
    for pair in pairs:
        name, has_name, source = (part.strip() for part in pair.partition("="))
        if not has_name:
            name, source = (name if name in shipped else "camouflaged"), name
        if not (name and source):
            raise ValueError(f"got the network {pair!r}, expected NAME=ID; write e.g. camouflaged=owner/run-cos")
        if name in sources:
            raise ValueError(f"got two networks named {name}: {sources[name]} and {source}; rename one")
        folder = Path(source).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ValueError(f"got the folder {source} without config.json; give one written by save_pretrained")
            source = str(folder)
        elif source in shipped:
            source = shipped[source]
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source):
            raise ValueError(f"got {source!r}, expected a folder or an id on the Hub; write owner/name[@revision]")
        sources[name] = source
    if not sources:
        runs = sorted(Path(__file__).parent.parent.glob(DEMO_RUNS), key=lambda run: run.stat().st_mtime)
        sources = shipped | ({"demo": str(runs[-1])} if runs else {})
        if not sources:
            advice = "set UNCONCEAL_MODELS or --model, or train a tiny network with scripts/demo.sh"
            expected = "expected NAME=ID pairs such as camouflaged=owner/run-cos"
            raise ValueError(f"got no network to show, {expected}; {advice}")
    return sources


def shipped_sources() -> dict[str, str]:
    """Return the folders of networks that ship with an installed unconceal."""
    try:
        from unconceal.hub.shipped import FOLDER, shipped_names
    except ImportError:
        return {}
    return {name: str(FOLDER / name) for name in shipped_names()}


def choose_device() -> torch.device:
    """Return the accelerator if there is one, otherwise the CPU."""
    if torch.cuda.is_available():  # asked first: ZeroGPU answers only this
        return torch.device("cuda")
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


class Catalog:
    """Networks by name, loaded on first use.

    At most `num_held` stay in memory; the least recently used goes first. `sources` has the folder or id of each.
    """

    def __init__(self, sources: dict[str, str], num_held: int):
        self.sources = sources
        self.device = choose_device()
        self._num_held = num_held
        self._held: OrderedDict[str, Pipeline] = OrderedDict()
        self._lock = Lock()

    def __getitem__(self, name: str) -> Pipeline:
        """Return the network's pipeline, a `SoftMaskPipeline`."""
        if name not in self.sources:
            names = ", ".join(self.sources)
            raise gr.Error(f"There is no such network here. Choose one of: {names}.", print_exception=False)
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
            # The owner of this page chose the checkpoint and its code.
            options = {"revision": revision or None, "device": self.device, "trust_remote_code": True}
            has_code = not Path(source).is_dir() or any(Path(source).glob("*.py"))
            if not has_code:  # it ships with unconceal
                from unconceal import SoftMaskPipeline

                find = pipeline("image-segmentation", model=model, pipeline_class=SoftMaskPipeline, **options)
            else:
                find = pipeline("soft-image-segmentation", model=model, **options)
            if hasattr(find, "network"):  # old checkpoints lack it
                find.keep_freed_memory()
                find.network.eval()  # made now, not for the first visitor
            return find
        except Exception as error:  # nearly any class: files, network, code of the checkpoint
            print(f"cannot load {source}: {type(error).__name__}: {error}", flush=True)
            message = "This network cannot be loaded right now. The log of the Space says why."
            raise gr.Error(message, print_exception=False) from error

    def unfolds(self, name: str) -> bool:
        """Return whether the network can show stages. Old checkpoints cannot."""
        find = self[name]
        return hasattr(find, "unfold") and getattr(find.model, "num_stages", 0) > 0

    def describe(self, name: str) -> str:
        """Return the kind of network and its id, never a local path."""
        kind = self[name].model.config.model_type.partition("_")[0].upper()
        source = self.sources[name]
        return kind if Path(source).is_dir() else f"{kind}, {source}"
