"""The protocols as modules of the `evaluate` library: from this tree, and from a Space's files without this package."""

import ast
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
import yaml
from PIL import Image

from unconceal.evaluation.protocols import PROTOCOLS
from unconceal.hub.metric_space import write_metric_space
from unconceal.utils.errors import UserError


METRICS = Path(__file__).parents[1] / "modeling" / "unconceal" / "metrics"
RNG = np.random.default_rng(0)
TARGETS = [RNG.random((24, 30)) < 0.3 for _ in range(3)]
PROBS = [np.clip(0.5 * target + 0.6 * RNG.random(target.shape), 0, 1).astype(np.float32) for target in TARGETS]


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Caches of the tests' own; the library has read its settings already."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(folder / "metrics"))
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(evaluate.loading, "init_dynamic_modules", lambda: str(made(folder / "modules")))
        patch.syspath_prepend(str(folder / "modules"))
        yield


def made(folder: Path) -> Path:
    modules = folder / "evaluate_modules"
    modules.mkdir(parents=True, exist_ok=True)
    (modules / "__init__.py").touch()
    return modules


def expected(name: str, **options) -> dict:
    protocol = PROTOCOLS[name]
    options = protocol.options(**{**protocol.report_options, **options})
    return protocol.summarize(protocol.score_image(*pair, **options) for pair in zip(PROBS, TARGETS, strict=True))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_module_gives_the_numbers_of_its_protocol(name):
    metric = evaluate.load(str(METRICS / f"unconceal_{name}.py"))
    assert metric.compute(predictions=PROBS, references=TARGETS) == expected(name)
    for probs, target in zip(PROBS, TARGETS, strict=True):
        metric.add(prediction=probs, reference=target)
    assert metric.compute() == expected(name)
    assert all(option in metric.inputs_description for option in PROTOCOLS[name].options())
    assert f"The protocol `{name}`" in metric.description


def test_options_pass():
    metric = evaluate.load(str(METRICS / "unconceal_dis.py"))
    results = metric.compute(predictions=PROBS, references=TARGETS, min_max=False, hce=False)
    assert results == expected("dis", min_max=False, hce=False)
    assert "hce" not in results
    with pytest.raises(ValueError, match="got option sharpness"):
        metric.compute(predictions=PROBS, references=TARGETS, sharpness=1)


def test_kinds_of_masks():
    metric = evaluate.load(str(METRICS / "unconceal_lesion.py"))
    hard = [probs > 0.5 for probs in PROBS]
    wanted = expected("lesion")

    def numbers(predictions, references=TARGETS):
        return metric.compute(predictions=predictions, references=references)

    assert numbers(hard) == wanted
    assert numbers([mask.astype(np.uint8) * 255 for mask in hard]) == wanted
    assert numbers([Image.fromarray(mask) for mask in hard]) == wanted
    assert numbers([torch.from_numpy(probs) for probs in PROBS]) == wanted
    assert numbers(np.stack(PROBS)) == wanted
    assert numbers([probs.astype(np.float64) for probs in PROBS]) == wanted
    assert numbers(hard, [target.astype(np.uint8) for target in TARGETS]) == wanted  # 0 and 1
    assert numbers(hard, [target.astype(np.uint8) * 255 for target in TARGETS]) == wanted
    assert numbers(hard, [target.astype(int).tolist() for target in TARGETS]) == wanted
    assert numbers(hard, [Image.fromarray(target) for target in TARGETS]) == wanted


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([np.full((4, 4), 2.0, np.float32)], [np.ones((4, 4), bool)], r"expected \[0, 1\]"),
        ([np.zeros((4, 4), np.float32)], [np.ones((4, 5), bool)], "size"),
        ([np.zeros((4, 4), np.int32)], [np.ones((4, 4), bool)], "prediction of mode I"),
        ([Image.new("RGB", (4, 4))], [np.ones((4, 4), bool)], "prediction of mode RGB"),
        ([np.zeros((4, 4), np.float32)], [np.full((4, 4), 300, np.int32)], "values from 300 to 300"),
        ([np.zeros((4, 4), np.float32)], [Image.new("RGB", (4, 4))], "reference of mode RGB"),
        ([np.zeros((4, 4), np.float32)], [np.full((4, 4), 0.2, np.float32)], "reference of mode F"),
        ([np.zeros((4, 4), np.float32)], [np.full((4, 4), np.nan, np.float32)], "reference of mode F"),
    ],
)
def test_what_is_no_mask_is_refused(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        evaluate.load(str(METRICS / "unconceal_lesion.py")).compute(predictions=predictions, references=references)


ALONE = """
import json, sys

sys.modules["unconceal"] = None  # as if it were not installed
import evaluate, numpy as np
pairs = np.load(sys.argv[1])
for folder in sys.argv[2:]:
    metric = evaluate.load(folder)
    print(json.dumps(metric.compute(predictions=list(pairs["probs"]), references=list(pairs["targets"]))))
"""


@pytest.mark.slow
def test_spaces_open_without_this_package(tmp_path):
    np.savez(tmp_path / "pairs.npz", probs=PROBS, targets=TARGETS)
    folders = [tmp_path / f"unconceal-{name}" for name in PROTOCOLS]
    for name, folder in zip(PROTOCOLS, folders, strict=True):
        files = write_metric_space(name, folder)
        assert {"README.md", "app.py", "requirements.txt", f"{folder.name}.py", "base.py", "module.py"} <= set(files)
    output = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "pairs.npz"), *map(str, folders)],
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        check=True,
    ).stdout
    assert [json.loads(line) for line in output.splitlines()] == [expected(name) for name in PROTOCOLS]


def test_the_files_of_a_space(tmp_path):
    write_metric_space("dis", tmp_path / "any-name")
    assert (tmp_path / "any-name" / "any-name.py").read_text() == (METRICS / "unconceal_dis.py").read_text()
    header = yaml.safe_load((tmp_path / "any-name" / "README.md").read_text().split("---")[1])
    assert (header["sdk"], header["app_file"], header["license"]) == ("gradio", "app.py", "apache-2.0")
    assert re.fullmatch(r"\d+\.\d+\.\d+", header["sdk_version"])
    assert {"evaluate", "metric"} <= set(header["tags"])
    assert len(header["short_description"]) <= 60  # the Hub's limit
    required = (tmp_path / "any-name" / "requirements.txt").read_text().split()
    assert any(line.startswith("pysodmetrics>=") for line in required)
    assert not any(line.startswith(("torch", "transformers")) for line in required)
    compile((tmp_path / "any-name" / "app.py").read_text(), "app.py", "exec")


def test_folders_that_cannot_be_a_space_are_refused(tmp_path):
    (tmp_path / "is-there").mkdir()
    for name, out, message in (
        ("dis", "is-there", "exists already"),
        ("dis", "dis", "with a hyphen, such as unconceal-dis"),  # would hide the standard library's
        ("dis", "app", "with a hyphen"),
        ("dis", "a name-x", "with a hyphen"),
        ("absent", "is-new", "expected one of segmentation, cod"),
    ):
        with pytest.raises(UserError, match=message):
            write_metric_space(name, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["is-there"]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_script_names_all_that_travels(name):
    """`evaluate` copies what the script itself names, and no more."""
    named = siblings_of(METRICS / f"unconceal_{name}.py")
    assert f"protocol_{name}" in named
    # As a Space's own files they stand before the standard library's, which has a `dis`.
    assert not named & sys.stdlib_module_names
    for sibling in named:
        text = (METRICS / f"{sibling}.py").read_text(encoding="utf-8")
        assert not re.search(r"^ *from (\.\.|\. |unconceal)|^ +from \.", text, re.MULTILINE)
        assert siblings_of(METRICS / f"{sibling}.py") <= named


def siblings_of(path: Path) -> set[str]:
    return set(re.findall(r"^from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE))


def test_no_script_takes_its_namesake_for_the_library():
    """Python puts scripts/ first on the path of each script there, so `import evaluate` would be scripts/evaluate.py."""
    for path in METRICS.parent.rglob("*.py"):
        if path.parent == METRICS and (path.stem == "module" or path.stem.startswith("unconceal_")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"evaluate", "module", "metrics.module"} & set(names), path
