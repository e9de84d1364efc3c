"""Networks that ship with the package: each folder of pretrained/, and the way there with a made-up one."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from common import rejected
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from save_tiny_models import PROCESSOR, make_image, make_tiny_model
from test_push_to_hub import Client
from transformers import AutoModel, AutoModelForImageSegmentation, pipeline

import unconceal
from unconceal.__main__ import main
from unconceal.api import load, weights_digest
from unconceal.data.builders import build_synthetic
from unconceal.hub import ship, shipped
from unconceal.models.networks import NETWORKS
from unconceal.training.checkpoints import Progress
from unconceal.training.recipe import load_recipe
from unconceal.training.start import build_model


ROOT = Path(__file__).parents[1]
PRETRAINED = shipped.FOLDER
NAMES = shipped.shipped_names()
SESSION = {
    **{"command": "unconceal train configs/run/polyp.yaml data.path=/data/kvasir", "git_commit": "0123456789-dirty"},
    **{"date": "2026-01-02T03:04:05+00:00", "processor": "a CPU", "cpus": 4, "threads": 2, "accelerator": None},
    **{"torch": "2.13.0"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    build_synthetic("camouflage", folder, {"train": 2, "val": 3}, size=48)
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run as training leaves it, with an untrained network."""
    folder = tmp_path_factory.mktemp("runs") / "run-tiny"
    best = folder / "segmentation" / "best"
    make_tiny_model("run").save_pretrained(best)
    PROCESSOR.save_pretrained(best)
    (folder / "recipe.yaml").write_text(
        f"network: run\noutput_dir: {folder}\ndata: {{path: {data}}}\nprotocol: cod\nbest_metric: s_measure\n"
        "phases: {segmentation: {epochs: 7, init_backbone_from: efficientnet-lite0}}\n"
    )
    start = {"part": "encoder", "source": "efficientnet-lite0", "sha256": "a" * 64}
    history = [{"epoch": 1, "seconds": 100, "total_seconds": 150}, {"epoch": 2, "seconds": 100, "total_seconds": 150}]
    for name, epochs in (("best", 1), ("last", 2)):
        (best.parent / name).mkdir(exist_ok=True)
        progress = Progress("segmentation", 1, epochs, epochs, 0.5, history[:epochs], start, [SESSION])
        (best.parent / name / "progress.json").write_text(json.dumps(asdict(progress)))
    return folder


@pytest.fixture(scope="module")
def made_up(run, tmp_path_factory):
    """A folder as pretrained/, with a network named polyp."""
    folder = tmp_path_factory.mktemp("package") / "pretrained"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "FOLDER", folder)
        ship.ship_model(run, "polyp")
    return folder


@pytest.fixture
def package(made_up, tmp_path, monkeypatch):
    """An installation with a copy of that folder, in a working folder of its own."""
    copied = Path(shutil.copytree(made_up, tmp_path / "package" / "pretrained"))
    monkeypatch.setattr(shipped, "FOLDER", copied)
    monkeypatch.chdir(tmp_path)
    make_image().save("photo.png")
    return copied


# Every network.


@pytest.fixture(params=[*NAMES, "a made-up one"])
def folder(request, made_up, monkeypatch):
    if request.param in NAMES:
        return PRETRAINED / request.param
    monkeypatch.setattr(shipped, "FOLDER", made_up)
    return made_up / "polyp"


def test_files_are_those_that_belong_there(folder):
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    pictures = {name: size for name, size in sizes.items() if name.endswith(".webp")}
    assert sizes.keys() - pictures.keys() == set(shipped.FILES)
    assert sizes[shipped.WEIGHTS] <= 12_000_000 and sum(pictures.values()) < 200_000
    card = (folder / shipped.CARD).read_text()
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", card)) == set(pictures)
    for name in (shipped.CONFIG, shipped.PROCESSOR, shipped.CARD):
        text = (folder / name).read_text()
        assert not re.search(r"""(^|[\s"'(])/(home|root|tmp|work|Users)/""", text), f"{name} has a local path"
        assert name == shipped.CARD or not re.search("auto_map|custom_pipelines", text), (
            "it names code that is not there"
        )


def test_card_says_what_the_files_hold(folder):
    facts, model = shipped.describe(folder.name), load(folder.name, "cpu").model
    assert facts.sha256 == shipped.weights_sha256(folder)
    assert facts.megabytes == round((folder / shipped.WEIGHTS).stat().st_size / 1e6, 2)
    assert facts.parameters == model.num_parameters()
    processor = json.loads((folder / shipped.PROCESSOR).read_text())
    size = f"{processor['size']['width']}x{processor['size']['height']}"
    assert facts.input_size == (size if processor["do_resize"] else "as it is")
    assert facts.name == folder.name and facts.numbers and all(vars(facts).values())
    card, written = ModelCard.load(folder / shipped.CARD), ship.load_texts()[folder.name]
    assert (facts.task, facts.terms) == (written["task"], written["terms"]), "run scripts/ship_model.py again"
    assert card.data.license == written["license"] and card.data.pipeline_tag == "image-segmentation"
    for words in (
        "- Command: `",
        "- Code: commit ",
        "- Hardware: ",
        "- Time: ",
        "- Start: ",
        "The recipe",
        *facts.numbers,
    ):
        assert words in card.text
    for limit in written["limits"] + written["fails"]:
        assert limit in card.text


def test_weights_are_float16_on_disk_and_float32_in_memory(folder):
    (model_class,) = (
        network.tasks["segmentation"]
        for network in NETWORKS.values()
        if network.config_class.model_type == json.loads((folder / shipped.CONFIG).read_text())["model_type"]
    )
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    stored, kept = load_file(folder / shipped.WEIGHTS), set(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        assert stored[name].dtype == (torch.float32 if kept & set(name.split(".")) else torch.float16), name
        assert torch.equal(stored[name].float(), parameter), name
    for name, buffer in model.named_buffers():
        assert name not in stored or stored[name].dtype == buffer.dtype, name

    image = make_image()
    find = pipeline("image-segmentation", model=str(folder), pipeline_class=unconceal.SoftMaskPipeline)
    segmenter = load(folder.name, "cpu")
    opened = [model, find.model, find.network, segmenter.model, segmenter.network]
    opened += [kind.from_pretrained(folder) for kind in (AutoModel, AutoModelForImageSegmentation)]
    for each in opened:
        assert {tensor.dtype for tensor in each.state_dict().values()} <= {torch.float32, torch.int64}
    mask = segmenter.segment(image, refine="never")
    assert mask.shape == (image.height, image.width) and np.isfinite(mask).all() and mask.std() > 0
    torch.testing.assert_close(find(image)["probs"], torch.from_numpy(mask))


def test_all_fit_into_the_package_and_are_documented():
    assert sum(path.stat().st_size for path in PRETRAINED.glob(f"*/{shipped.WEIGHTS}")) <= 45_000_000
    section = (ROOT / "docs" / "use.md").read_text().split("## Networks that ship")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE) == NAMES
    assert "docs/use.md#networks-that-ship" in (ROOT / "README.md").read_text()


# By its name.


@pytest.mark.slow
def test_a_name_stands_for_a_model_everywhere(package, run, data, monkeypatch, capsys):
    best = run / "segmentation" / "best"
    assert unconceal.pretrained("polyp") == package / "polyp"
    expected = load(package / "polyp", "cpu").segment("photo.png")
    assert np.abs(expected - load(best, "cpu").segment("photo.png")).max() < 0.02, "rounded too much"
    assert np.array_equal(load("polyp", "cpu").segment("photo.png"), expected)

    given = ["photo.png", "--model", "polyp", "--device", "cpu"]
    assert main(["segment", *given, "--out", "masks"]) == 0
    assert np.abs(np.asarray(Image.open("masks/photo.png")) - 255 * expected).max() < 0.51
    assert main(["explain", *given, "--out", "sheet.png"]) in (0, None)
    evaluate = ["evaluate", "--model", "polyp", "--data", str(data), "--split", "val", "--protocol", "cod"]
    main([*evaluate, "--out", "results", "--metric-workers", "0"])
    measured = json.loads(Path("results/results.json").read_text())
    assert (measured["model"], measured["weights"]) == ("polyp", weights_digest(load("polyp", "cpu").model))
    # These are the numbers of the card: the commands on it repeat them.
    for title, value in shipped.describe("polyp").numbers.items():
        name = {"S": "s_measure", "mean Dice at 0.5": "mean_dice_at_0.5"}[title]
        assert measured["results"][name] == pytest.approx(value)
    recipe = load_recipe(run / "recipe.yaml")
    model = build_model(recipe, "segmentation", "polyp")
    assert weights_digest(model) == measured["weights"]
    assert main(["benchmark", "polyp", "--only", "size"]) == 0
    assert "| polyp | 64x64 |" in capsys.readouterr().out

    best.rename(tmp := best.with_name("moved"))
    try:
        shutil.copytree(tmp, "polyp")  # a folder of that name wins
    finally:
        tmp.rename(best)
    assert weights_digest(load("polyp", "cpu").model) == weights_digest(load(best, "cpu").model)


def test_list(package, monkeypatch, capsys):
    main(["models"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].startswith(
        "| `polyp` | polyps in colonoscopy images | RUN with efficientnet-lite0 |"
    )
    assert "research and education only" in lines[2] and re.search(
        r"mean Dice at 0.5 0\.\d\d\d, S 0\.\d\d\d", lines[2]
    )
    main(["models", "--json"])
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts["sha256"] == shipped.weights_sha256(package / "polyp")
    monkeypatch.setattr(shipped, "FOLDER", package / "absent")
    main(["models"])
    assert capsys.readouterr().out.startswith("this installation has no trained networks")


def test_wrong_names_and_damaged_files_are_one_line(package, run, monkeypatch):
    for attempt in (lambda: load("polip"), lambda: unconceal.pretrained("polip")):
        with rejected("'polip', which is no folder and none of those that ship: polyp"):
            attempt()
    recipe = load_recipe(ROOT / "configs/run/smoke.yaml", ["data.path=data"])
    with rejected("none of those that ship"):
        build_model(recipe, "segmentation", "polip")
    weights, card = package / "polyp" / shipped.WEIGHTS, package / "polyp" / shipped.CARD
    content = weights.read_bytes()
    for damaged in (content[:-9], content[:-1] + bytes([content[-1] ^ 1]), b""):
        weights.write_bytes(damaged)
        with rejected("the weights of the shipped network polyp are damaged; install unconceal again"):
            load("polyp", "cpu")
    weights.write_bytes(content)
    text = card.read_text()
    for damaged, says in (("# no header", "lacks"), (text.replace("sha256:", "other:"), "lacks 'sha256'")):
        card.write_text(damaged)
        with rejected(says):
            load("polyp", "cpu")
    card.unlink()
    with rejected("cannot read the card"):
        load("polyp", "cpu")
    monkeypatch.setattr(shipped, "FOLDER", package / "absent")
    with rejected("no trained networks are in this installation of unconceal; install it from"):
        load("polyp")


@pytest.mark.slow
def test_space_shows_shipped_networks(package, run):
    pytest.importorskip("gradio", reason="the demo needs the extra `space`")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "space")
        from catalog import USES, Catalog, choose_sources, examples_of
    try:
        sources = choose_sources(["polyp"])
        assert sources == {"polyp": str(package / "polyp")}
        catalog = Catalog(sources, 1)
        assert catalog.unfolds("polyp") and catalog.describe("polyp") == "RUN"
        mask = catalog["polyp"](make_image())["probs"].numpy()
        np.testing.assert_allclose(mask, load("polyp").segment(make_image()), atol=1e-5)
        assert [name for name in NAMES if name not in USES or not examples_of(name)] == []
    finally:
        sys.modules.pop("catalog")


# The card, and how a network is made.


def test_card_comes_from_records(package):
    text = (package / "polyp" / shipped.CARD).read_text()
    for part in (
        "- Command: `unconceal train configs/run/polyp.yaml data.path=.../kvasir`\n",
        "- Code: commit 0123456789 with uncommitted changes\n",
        "- Hardware: 2 of 4 cores (a CPU), torch 2.13.0\n",
        "- Time: 5 minutes for 2 epochs, with evaluations; this is epoch 1\n",
        f"- Start: encoder from `efficientnet-lite0`, SHA-256 of these weights `{'a' * 64}`\n",
        "after its weights were rounded to float16",
        "--model polyp --data .../scenes --split val --protocol cod\n",
        "expect less on other images",
        "Weights: research and education only.",
    ):
        assert part in text
    assert "False alarms" not in text and "The paper's figures" not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    make_image().save("photo.jpg")
    namespace = {}
    exec(code, namespace)
    assert namespace["mask"].shape == (50, 70)


def test_card_names_the_training_before(run, made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "pretrained")
    second = tmp_path / "run-fine"
    shutil.copytree(run, second)
    best = second / "segmentation" / "best"
    first = json.loads((best / "progress.json").read_text())
    first["recipe"] = asdict(load_recipe(run / "recipe.yaml"))
    started = run / "segmentation" / "best"
    start = {"part": "network", "source": str(started), "sha256": "b" * 64, "before": first}
    again = load_recipe(
        run / "recipe.yaml",
        ["phases.segmentation.epochs=5", "phases.segmentation.init_backbone_from=null"],
    )
    record = {**first, "start": start, "recipe": asdict(again)}
    for name in ("best", "last"):
        (best.parent / name / "progress.json").write_text(json.dumps(record))
    (second / "recipe.yaml").unlink()  # the record is enough
    card = (ship.ship_model(second, "polyp") / "README.md").read_text()
    now, _, before = card.partition("### The training before it")
    assert "Start: network from `run-tiny/segmentation/best`, SHA-256 of these weights `bbbb" in now
    assert "Start: encoder from `efficientnet-lite0`, SHA-256 of these weights `aaaa" in before
    assert "epochs: 5" in now and "epochs: 7" in before
    assert "network: RUN with efficientnet-lite0" in now and before.count("## Results") == 1


def test_card_of_a_network_that_keeps_the_size_of_images(run, made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "pretrained")
    own = Path(shutil.copytree(run, tmp_path / "own"))
    for name in ("best", "last"):
        file = own / "segmentation" / name / "preprocessor_config.json"
        if file.exists():
            file.write_text(json.dumps({**json.loads(file.read_text()), "do_resize": False}))
    text = (ship.ship_model(own, "polyp") / "README.md").read_text()
    resized = (made_up / "polyp" / "README.md").read_text()
    sizes = "images keep their size; images larger than 64x64 are cut into overlapping tiles."
    assert sizes in text and "images are resized to" not in text and "Every image is resized" not in text
    assert sizes not in resized and "images are resized to 64x64." in resized
    assert ".\n- It tells one kind" in text and ".\n- It tells one kind" in resized  # no gap in the list
    assert shipped.describe("polyp").input_size == "as it is"


def test_false_alarms_are_counted_apart(run, made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "pretrained")
    split = ship.load_data(load_recipe(run / "recipe.yaml").data)["val"]
    nothing = Image.new("L", split[0]["mask"].size)
    changed = split.map(lambda row, index: {**row, "mask": nothing if index == 0 else row["mask"]}, with_indices=True)
    monkeypatch.setattr(ship, "load_data", lambda _: {"val": changed})
    monkeypatch.setitem(ship.load_texts(), "polyp", {**ship.load_texts()["polyp"], "headline": ["niou"]})
    ship.ship_model(run, "polyp")
    card = ModelCard.load(tmp_path / "pretrained" / "polyp" / shipped.CARD)
    assert "False alarms: in 1 of 1 images without an object something is above 0.5." in card.text
    assert "polyp, images with an object (2 images, images with an object)" in card.text
    rows = [row for row in card.data.eval_results if row.metric_type in ("niou", "false_alarm_share")]
    assert [row.metric_args for row in rows] == [["images with an object"], None, None]
    assert rows[2].metric_value == 1
    assert shipped.describe("polyp").numbers == {"nIoU": rows[0].metric_value}


@pytest.mark.slow
def test_what_cannot_ship_leaves_nothing(run, made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "pretrained")
    with rejected("got the name polip, expected one of polyp"):
        ship.ship_model(run, "polip")
    monkeypatch.setattr(ship, "MAX_MEGABYTES", 0.001)
    with rejected("expected at most 0.001"):
        ship.ship_model(run, "polyp")
    monkeypatch.setattr(ship, "MAX_MEGABYTES", 12)
    with rejected("no results of the weights"):
        results = tmp_path / "results"
        results.mkdir()
        record = {
            "name": "a",
            "protocol": "cod",
            "results": {"num_images": 1, "mae": 0.1},
            "sources": {},
            "options": {},
        }
        (results / "results.json").write_text(json.dumps(record))
        ship.ship_model(run, "polyp", results=[results])
    large = load(run / "segmentation" / "best", "cpu")
    next(large.model.parameters()).data.fill_(1e6)
    large.model.save_pretrained(tmp_path / "large")
    large.processor.save_pretrained(tmp_path / "large")
    record = json.loads((run / "segmentation" / "best" / "progress.json").read_text())
    record["recipe"] = asdict(load_recipe(run / "recipe.yaml"))
    (tmp_path / "large" / "progress.json").write_text(json.dumps(record))
    with rejected("do not fit into float16"):
        ship.ship_model(run, "polyp", tmp_path / "large")
    (tmp_path / "large" / "progress.json").unlink()
    with rejected("no progress.json"):
        ship.ship_model(run, "polyp", tmp_path / "large")
    assert list((tmp_path / "pretrained").iterdir()) == []


# Elsewhere.


@pytest.mark.slow
def test_pushed_network_keeps_weights_and_card(package, tmp_path):
    client = Client(tmp_path / "home")
    try:
        client.run(
            f"from pathlib import Path\nfrom unconceal.hub import shipped\nshipped.FOLDER = Path({str(package)!r})"
        )
        assert "a shipped network with its own card" in client.refuse(
            "model", "polyp", "org/run-polyp", "--license", "mit"
        )
        client.push("model", "polyp", "org/run-polyp", "--public")
        sent = client.hub.files("org/run-polyp")
        assert sent[shipped.WEIGHTS] == (package / "polyp" / shipped.WEIGHTS).read_bytes()
        assert {"failures.webp", "modeling_run.py", "pipeline_unconceal.py"} <= set(sent)
        ours, theirs = (package / "polyp" / shipped.CARD).read_text(), sent[shipped.CARD].decode()
        assert theirs.split("## Training data")[1].startswith(ours.split("## Training data")[1])
        assert ours.split("# polyp")[0] == theirs.split("# polyp")[0]
        snippet = theirs.split("## Use")[1].split("```python\n")[1].split("```")[0]
        assert "org/run-polyp" in snippet
        # Without this package: its modules are marked as absent.
        from common import modules_beyond_transformers

        make_image().save(tmp_path / "photo.jpg")
        code = f"import sys\nsys.modules.update(dict.fromkeys({modules_beyond_transformers()}))\n{snippet}\n"
        code += (
            "mask.save('mask.png')\nfrom transformers import AutoModel\n"
            "model = AutoModel.from_pretrained('org/run-polyp', trust_remote_code=True)\n"
            "import torch\nassert model.dtype == torch.float32, model.dtype\n"
        )
        environment = client.hub.environment(tmp_path / "visitor", token=None)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        expected = load("polyp", "cpu").segment(tmp_path / "photo.jpg")
        assert np.abs(np.asarray(Image.open(tmp_path / "mask.png")) - 255 * expected).max() < 0.51
    finally:
        client.close()


@pytest.mark.slow
def test_wheel_holds_the_networks(made_up, tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="builds a wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "modeling", tmp_path / "modeling", ignore=ignore)
    shutil.copytree(made_up / "polyp", tmp_path / "modeling" / "unconceal" / "pretrained" / "tiny")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    expected = {f"unconceal/pretrained/{name}/{file}" for name in (*NAMES, "tiny") for file in shipped.FILES}
    assert expected | {"unconceal/hub/shipped.yaml", "unconceal/hub/card_use.md"} <= held
    assert {name for name in held if "/pretrained/" in name and name.endswith(".py")} == set()


def test_a_network_of_the_older_form_predicts_as_when_it_was_trained():
    """The numbers were computed by the code that trained it, commit 54577dd."""
    model = load("camouflage")
    assert model.model.config.background_step == "correction"
    probs = model.segment(Image.open(ROOT / "space/examples/camouflage-1.jpg"), refine="never")
    assert probs.mean() == pytest.approx(0.07474, abs=1e-4)
    expected = [[0.002, 0.077, 0.075, 0.996], [0.002, 0.919, 0.903, 0.990], [0.002, 0.017, 0.972, 0.998]]
    np.testing.assert_allclose(probs[200:320:40, 240:400:40], expected, atol=2e-3)
