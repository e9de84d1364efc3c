"""Open saved networks in every way, with and without this package."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import bare_environment
import pytest
import torch
from common import modules_beyond_transformers, rejected
from PIL import Image
from safetensors.torch import load_file, save_file
from save_tiny_models import TESTERS, save_tiny_models
from transformers import AutoProcessor, pipeline
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from unconceal import UnconcealImageProcessor
from unconceal.api import load
from unconceal.models.pipeline_unconceal import SoftMaskPipeline
from unconceal.utils.errors import UserError
from unconceal.utils.loading_errors import loading_explained


# Runs tests/bare_environment.py twice: with transformers and its requirements only, and with pymatting, too. None in
# `sys.modules` marks a module as absent.
BARE = """
import json, runpy, sys, torch
script, *runs = json.loads(sys.argv[1])
for absent, arguments in runs:
    for name in [name for name, module in sys.modules.items() if module is None]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(absent))
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        print("threads:", torch.get_num_threads())
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module", params=TESTERS)
def folder(saved, request):
    return saved[list(TESTERS).index(request.param)]


@pytest.fixture
def expected(folder):
    return load_file(folder / "expected.safetensors")


@pytest.fixture
def image(folder):
    return Image.open(folder / "image.png")


@pytest.mark.slow
def test_every_way_works_without_the_package(saved, tmp_path):
    # The numbers of the last folder are wrong. So one process shows both: equal numbers pass, a difference fails.
    first, *others = map(str, saved)
    wrong = shutil.copytree(others[-1], tmp_path / "wrong")
    expected = load_file(wrong / "expected.safetensors")
    save_file({**expected, "logits": expected["logits"] + 1e-6}, wrong / "expected.safetensors")
    bare = modules_beyond_transformers(), others
    with_pymatting = modules_beyond_transformers("pymatting"), ["--allow-packages", first, str(wrong)]
    command = [sys.executable, "-c", BARE, json.dumps([bare_environment.__file__, bare, with_pymatting])]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert f"FAILED: {wrong}: AutoModel, equal logits" in done.stderr, done.stdout + done.stderr
    assert done.returncode == 1
    ways = [{line for line in done.stdout.splitlines() if f" {one}: " in line} for one in saved]
    assert len(ways[0]) == len(ways[1]) == len(ways[2]) > 15
    whose = [re.findall("cut-out in (.*) colors", "\n".join(lines)) for lines in ways]
    assert whose == [["object" if find_spec("pymatting") else "image"], ["image"], ["image"]]
    assert done.stdout.count("threads: 1\n") == 2  # numba, which pymatting imports, gives torch every core


@pytest.mark.parametrize("auto_class", [AutoImageProcessor, AutoProcessor])
def test_auto_classes_open_the_processor(folder, image, expected, auto_class):  # common.py opens the networks
    processor = auto_class.from_pretrained(folder)
    assert type(processor) is UnconcealImageProcessor
    assert torch.equal(processor(image).pixel_values, expected["pixel_values"])


@pytest.mark.parametrize("options", [{}, {"device_map": "auto", "dtype": torch.bfloat16}])
def test_soft_pipeline_runs_no_code_of_the_folder(folder, image, expected, options):
    find = pipeline("image-segmentation", model=str(folder), pipeline_class=SoftMaskPipeline, **options)
    assert type(find) is SoftMaskPipeline
    assert type(find.model) is TESTERS[folder.name].model_class
    assert find.model.dtype == options.get("dtype", torch.float32)
    probs = find(image)["probs"].cpu()
    with torch.no_grad():
        outputs = find.network(expected["pixel_values"].to(find.model.device, find.model.dtype))
    (of_model,) = find.image_processor.post_process_masks(outputs, [(50, 70)])
    assert torch.equal(probs, of_model.cpu())
    (exact,) = find.image_processor.post_process_masks(SemanticSegmenterOutput(logits=expected["logits"]), [(50, 70)])
    torch.testing.assert_close(probs, exact, rtol=0, atol=0.2 if "dtype" in options else 1e-4)


def test_hard_pipeline_does_not_ask_to_run_code(folder, image, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "n")
    masks = pipeline("image-segmentation", model=str(folder))(image)
    assert {mask["label"] for mask in masks} <= {"background", "object"} and masks
    assert asked == []


def without_code(folder):
    for path in folder.glob("*.py"):
        path.unlink()


def of_another_project(folder):
    """Give the folder a type of no registered network."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "another"}))


@pytest.mark.parametrize(
    ("damages", "trust_remote_code", "words"),
    [
        ([of_another_project], False, "pass trust_remote_code"),
        ([of_another_project, without_code], True, "no.* file named configuration_srs.py"),
        ([of_another_project, lambda folder: (folder / "losses.py").unlink()], True, "losses.py"),
        ([of_another_project, lambda folder: (folder / "losses.py").write_text("def loss(")], True, "losses.py"),
    ],
    ids=["code not trusted", "code missing", "a file of the code missing", "code incomplete"],
)
def test_unusable_folders_are_one_clear_line(saved, tmp_path, damages, trust_remote_code, words):
    folder = Path(shutil.copytree(saved[-1], tmp_path / "damaged"))
    for damage in damages:
        damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        load(folder, device="cpu", trust_remote_code=trust_remote_code)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("losses.py", "from torch import no_such_name", "ImportError at losses.py:.*no_such_name"),
        ("losses.py", "{}['oops']", "KeyError at losses.py:.*'oops'"),
        ("modeling_srs.py", "torch.zeros(2, 3) @ torch.zeros(2, 3)", "RuntimeError at modeling_srs.py:"),
        ("modeling_srs.py", "nn.Linear(2, 3)(torch.zeros(4))", "RuntimeError at modeling_srs.py:"),
    ],
)
def test_defects_in_the_code_of_a_checkpoint_name_their_place(saved, tmp_path, name, line, words):
    folder = Path(shutil.copytree(saved[-1], tmp_path / "defect"))
    of_another_project(folder)
    with (folder / name).open("a") as file:
        file.write(f"\n{line}\n")
    with rejected(f"{words}.*were not edited, this is a defect.*UNCONCEAL_DEBUG=1"):
        load(folder, device="cpu", trust_remote_code=True)


@pytest.mark.parametrize("error", [ImportError, RuntimeError, ValueError])
def test_errors_raised_on_purpose_are_one_plain_line(error):
    with pytest.raises(UserError) as caught, loading_explained("recipe"):
        raise error("got 1, expected 2")
    assert str(caught.value) == "recipe: got 1, expected 2"


def test_the_package_replaces_missing_code(saved, tmp_path):
    folder = Path(shutil.copytree(saved[-1], tmp_path / "bare"))
    without_code(folder)
    assert load(folder, device="cpu").model.config.model_type == "srs_seg"
