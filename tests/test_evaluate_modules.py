"""Test the protocols as metrics of the library `evaluate`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

from unconceal.evaluation.protocols import PROTOCOLS


FOLDER = Path(__file__).parents[1] / "modeling" / "unconceal" / "evaluation"
RNG = np.random.default_rng(0)
TARGETS = [RNG.random((24, 30)) < 0.3 for _ in range(3)]
PROBS = [np.clip(0.5 * target + 0.6 * RNG.random(target.shape), 0, 1).astype(np.float32) for target in TARGETS]


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Give the tests a cache of their own."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(folder / "metrics"))
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(folder / "modules"))
        modules = folder / "modules" / "evaluate_modules"
        modules.mkdir(parents=True)
        (modules / "__init__.py").touch()
        patch.setattr(evaluate.loading, "init_dynamic_modules", lambda: str(modules))
        patch.syspath_prepend(str(folder / "modules"))
        forget_modules()  # another test may have loaded some from another cache
        yield
    forget_modules()


def forget_modules():
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


def expected(name: str, **options) -> dict:
    protocol = PROTOCOLS[name]
    options = protocol.options(**{**protocol.report_options, **options})
    return protocol.summarize(protocol.score_image(*pair, **options) for pair in zip(PROBS, TARGETS, strict=True))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_module_gives_the_numbers_of_its_protocol(name):
    metric = evaluate.load(str(FOLDER / f"unconceal_{name}.py"))
    assert metric.compute(predictions=PROBS, references=TARGETS) == expected(name)
    for probs, target in zip(PROBS, TARGETS, strict=True):
        metric.add(prediction=probs, reference=target)
    assert metric.compute() == expected(name)
    assert all(option in metric.inputs_description for option in PROTOCOLS[name].options())
    assert f"The protocol `{name}`" in metric.description


def test_options_reach_the_protocol():
    metric = evaluate.load(str(FOLDER / "unconceal_dis.py"))
    results = metric.compute(predictions=PROBS, references=TARGETS, min_max=False, hce=False)
    assert results == expected("dis", min_max=False, hce=False)
    assert "hce" not in results
    with pytest.raises(ValueError, match="got option sharpness"):
        metric.compute(predictions=PROBS, references=TARGETS, sharpness=1)


def test_masks_of_all_kinds_give_equal_numbers():
    metric = evaluate.load(str(FOLDER / "unconceal_lesion.py"))
    hard = [probs > 0.5 for probs in PROBS]
    wanted = expected("lesion")

    levels, floats = [mask.astype(np.uint8) * 255 for mask in hard], [probs.astype(np.float64) for probs in PROBS]
    images, tensors = [Image.fromarray(mask) for mask in hard], [torch.from_numpy(probs) for probs in PROBS]
    for predictions in (hard, levels, images, tensors, np.stack(PROBS), floats):
        assert metric.compute(predictions=predictions, references=TARGETS) == wanted
    bits = [target.astype(np.uint8) for target in TARGETS]
    lists, images = [target.tolist() for target in bits], [Image.fromarray(target) for target in TARGETS]
    for references in (bits, [255 * target for target in bits], lists, images, [38 * target for target in bits]):
        assert metric.compute(predictions=hard, references=references) == wanted


@pytest.mark.parametrize("white", [1, 2, 100, 255, 300])
def test_predictions_and_references_follow_one_rule(white):
    metric = evaluate.load(str(FOLDER / "unconceal_lesion.py"))
    hard = [(probs > 0.5) * np.array(white, np.uint8 if white < 256 else np.int32) for probs in PROBS]
    truth = [target * np.array(white, np.int32) for target in TARGETS]
    assert metric.compute(predictions=hard, references=truth) == expected("lesion")
    assert metric.compute(predictions=truth, references=truth)["mean_iou"] == 1


def test_a_dark_prediction_stays_soft_among_others(caplog):
    metric = evaluate.load(str(FOLDER / "unconceal_lesion.py"))
    levels = [np.rint(probs * 255).astype(np.uint8) for probs in PROBS]
    dark = [levels[0] > 200, *levels[1:]]
    dark[0] = dark[0].astype(np.uint8)
    scores = metric.compute(predictions=dark, references=TARGETS)
    assert "1 predictions hold one value beside 0, not above half of white" in caplog.text
    dark[0] = np.zeros_like(levels[0])
    assert scores == metric.compute(predictions=dark, references=TARGETS)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([np.full((4, 4), 2.0, np.float32)], [np.ones((4, 4), bool)], r"expected \[0, 1\]"),
        ([np.full((4, 4), -1, np.int32)], [np.ones((4, 4), bool)], "values from -1 to -1"),
        ([np.zeros((4, 4), np.float32)], [np.full((4, 4), 70000, np.int32)], "values from 70000 to 70000"),
        ([np.zeros((4, 4), np.float32)], [np.diag([1, 2, 3, 0])], "values 0, 1, 2, 3, a map of classes"),
        ([np.zeros((4, 4), np.float32)], [np.eye(4, dtype=np.float32) * 0.5 + 0.55], "fractions up to 1.05"),
        (
            [np.zeros((4, 4), np.float32)],
            [np.full((4, 4), 0.2, np.float32)],
            "values from 0.2 to 0.2, none above half",
        ),
        ([np.zeros((4, 4), np.float32)], [np.full((4, 4), np.nan, np.float32)], "16 of 16 pixel values that are NaN"),
    ],
)
def test_other_values_than_masks_are_rejected(predictions, references, message):
    # Another id each time: a failed metric keeps its file locked, and the next one would wait.
    metric = evaluate.load(str(FOLDER / "unconceal_lesion.py"), experiment_id=re.sub(r"\W", "", message))
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)


ALONE = """
import json, sys

sys.modules["unconceal"] = None  # as if it were not installed
import evaluate, numpy as np
pairs = np.load(sys.argv[1])
for file in sys.argv[2:]:
    metric = evaluate.load(file)
    print(json.dumps(metric.compute(predictions=list(pairs["probs"]), references=list(pairs["targets"]))))
"""


@pytest.mark.thorough  # the next test is the quick one
def test_modules_work_without_this_package(tmp_path):
    np.savez(tmp_path / "pairs.npz", probs=PROBS, targets=TARGETS)
    files = [str(FOLDER / f"unconceal_{name}.py") for name in PROTOCOLS]
    command = [sys.executable, "-c", ALONE, str(tmp_path / "pairs.npz"), *files]
    options = {"env": {**os.environ, "HF_HOME": str(tmp_path / "home")}, "cwd": tmp_path, "check": True}
    output = subprocess.run(command, stdout=subprocess.PIPE, **options).stdout
    assert [json.loads(line) for line in output.splitlines()] == [expected(name) for name in PROTOCOLS]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_module_names_all_files_that_it_needs(name):
    """`evaluate` copies only the files that the module itself names."""
    named = siblings_of(FOLDER / f"unconceal_{name}.py")
    assert f"protocol_{name}" in named
    for sibling in named:
        text = (FOLDER / f"{sibling}.py").read_text(encoding="utf-8")
        assert not re.search(r"^ *from (\.\.|\. |unconceal)|^ +from \.", text, re.MULTILINE)
        assert siblings_of(FOLDER / f"{sibling}.py") <= named


def test_the_rule_for_masks_is_the_one_of_the_networks():
    """A checkout without symbolic links has a file of one line here."""
    shared = FOLDER.parent / "models" / "reading.py"
    assert (FOLDER / "reading.py").read_text(encoding="utf-8") == shared.read_text(encoding="utf-8")


def siblings_of(path: Path) -> set[str]:
    return set(re.findall(r"^from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE))
