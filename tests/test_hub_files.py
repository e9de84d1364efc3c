"""Test that model files can be copied to the Hub."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from common import SMALLEST_SRS, modules_beyond_transformers
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from unconceal import SrsConfig, SrsForImageSegmentation, SrsForReconstruction, UnconcealImageProcessor


MODELS = Path(__file__).parents[1] / "modeling" / "unconceal" / "models"
FILES = sorted(MODELS.rglob("*.py"))
ALLOWED = sys.stdlib_module_names | {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}


def faults(path: Path) -> list[str]:
    """List what would break when transformers copies `path` to the Hub."""
    found = [
        # transformers searches the whole text, even docstrings.
        f"transformers would copy {name}.py, which does not exist"
        for name in get_relative_imports(path)
        if not (path.parent / f"{name}.py").is_file()
    ]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level and not node.module:
            found.append(f"line {node.lineno}: `from . import x` is not copied, write `from .x import name`")
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            found.append(f"line {node.lineno}: the copied files have no parent package")
    found += [f"{name} would be required to open the model" for name in sorted(set(get_imports(path)) - ALLOWED)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_file_can_travel(path):
    assert path.parent == MODELS, "subfolders are not copied"
    assert faults(path) == []


@pytest.mark.parametrize(
    "source",
    [
        "from ..errors import UserError",
        "from .. import errors",
        "from . import losses",
        "from .layers.losses import dice_loss",
        "from unconceal.models.losses import dice_loss",
        '"""Shapes are taken\nfrom .examples import demo\n"""',
        "import timm",
        "def late():\n    import timm",
    ],
)
def test_faults_are_found(source, tmp_path):
    (tmp_path / "losses.py").touch()
    path = tmp_path / "modeling_new.py"
    path.write_text(source)
    assert len(faults(path)) >= 1


def test_fresh_process_hides_other_packages():
    hidden = set(modules_beyond_transformers())
    assert {"unconceal", "datasets", "accelerate", "omegaconf", "pytest"} <= hidden
    assert hidden.isdisjoint({"torch", "transformers", "huggingface_hub", "numpy", "PIL", "safetensors", "yaml"})


@pytest.mark.parametrize("model_class", [SrsForImageSegmentation, SrsForReconstruction])
def test_saved_folder_holds_every_named_class(model_class, tmp_path):
    torch.manual_seed(0)
    model_class(SrsConfig(**SMALLEST_SRS)).save_pretrained(tmp_path)
    UnconcealImageProcessor().save_pretrained(tmp_path)
    for file_name, auto_classes in (
        ("config.json", {"AutoConfig", *model_class.auto_classes}),
        ("preprocessor_config.json", {"AutoImageProcessor"}),
    ):
        auto_map = json.loads((tmp_path / file_name).read_text())["auto_map"]
        assert set(auto_map) == auto_classes
        for reference in auto_map.values():
            module, class_name = reference.split(".")
            tree = ast.parse((tmp_path / f"{module}.py").read_text(encoding="utf-8"))
            assert class_name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}, reference
    copied = sorted(tmp_path.glob("*.py"))
    names = {path.name for path in copied}
    assert {"image_processing_unconceal.py", "pipeline_unconceal.py", "refine.py", "cutout.py"} <= names
    for path in copied:
        assert faults(path) == []
        assert path.read_bytes() == (MODELS / path.name).read_bytes()
