"""`unconceal push` against a local Hub, with clients in their own processes."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from common import modules_beyond_transformers
from hub_server import HubServer
from huggingface_hub import ModelCard, RepoCard
from PIL import ExifTags, Image
from save_tiny_models import PROCESSOR, TESTERS, make_image, make_tiny_model

from unconceal.__main__ import main
from unconceal.api import load, weights_digest
from unconceal.data.builders import build_synthetic
from unconceal.data.cards import describe_set
from unconceal.hub import cards
from unconceal.hub.card_on_hub import kept_license, with_kept_results
from unconceal.hub.convert import save_converted
from unconceal.hub.stage import stage_dataset, stage_model, stage_space
from unconceal.training.checkpoints import Progress, read_record
from unconceal.training.recipe import load_recipe
from unconceal.utils.errors import UserError
from unconceal.utils.signatures import sign


ROOT = Path(__file__).parents[1]
SESSION = {
    **{"command": "unconceal train", "git_commit": None, "date": "2026-01-02T03:04:05+00:00", "processor": "a CPU"},
    **{"cpus": 4, "threads": 2, "accelerator": None, "torch": "2.13.0"},
}
# One process for all commands, because each start costs seconds. It reads arguments or code, and answers.
CLIENT = """
import json, os, sys, time, traceback
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from unconceal.__main__ import main
from unconceal.utils.errors import run_main
time.sleep = lambda seconds: None  # between attempts
for line in sys.stdin:
    task, said = json.loads(line), StringIO()
    os.environ.pop("HF_TOKEN", None)
    if task["token"]:
        os.environ["HF_TOKEN"] = task["token"]
    with redirect_stdout(said), redirect_stderr(said):
        try:
            run_main(lambda: main(["push", *task["argv"]]) if "argv" in task else exec(task["code"], {}))
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
    print(json.dumps([code, said.getvalue()]), flush=True)
"""


class Client:
    """A Hub, and a process to push from."""

    def __init__(self, home: Path):
        self.hub = HubServer()
        self.hub.start()
        environment = self.hub.environment(home)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", CLIENT], env=environment, **pipes)

    def close(self):
        try:
            self.process.kill()
            self.process.communicate()
        finally:
            self.hub.stop()

    def _do(self, expected: int, token: str | None = "hf_test", **task) -> str:
        self.process.stdin.write(json.dumps({"token": token, **task}) + "\n")
        self.process.stdin.flush()
        code, said = json.loads(self.process.stdout.readline())
        assert code == expected, said
        assert code == 0 or said.count("\n") == 1, said  # an error is one line
        return said.strip()

    def push(self, *words) -> str:
        """Run a successful command; return its output."""
        return self._do(0, argv=list(map(str, words)))

    def refuse(self, *words, **token) -> str:
        """Run a failing command; return its one line."""
        return self._do(2, argv=list(map(str, words)), **token)

    def run(self, code: str):
        """Run code without an error."""
        self._do(0, code=code)

    def fail(self, code: str) -> str:
        """Run failing code; return its one line."""
        return self._do(2, code=code)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    client = Client(tmp_path_factory.mktemp("home"))
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name in TESTERS:
        make_tiny_model(name).save_pretrained(folder / name)
        PROCESSOR.save_pretrained(folder / name)
        (folder / name / "notes.txt").touch()
    return {name: folder / name for name in TESTERS}


@pytest.fixture
def space(tmp_path) -> Path:
    """Return a folder of a Space, and leftovers of tools in it."""
    folder = tmp_path / "demo"
    for name, text in {
        "README.md": "---\nsdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\n---\n# Demo\n",
        "app.py": "print()\n",
        "examples/one.txt": "1",
        "__pycache__/app.pyc": "x",
        ".venv/bin/python": "x",
        ".env": "HF_TOKEN=hf_secret",
        "examples/.netrc": "secret",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "again").symlink_to(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    build_synthetic("camouflage", folder, {"train": 3, "val": 2}, size=32)
    return folder


# ---- what arrives ---------------------------------------------------------------------------------------------------


def test_pushed_models_open_by_the_code_on_their_cards_without_this_package(client, models, tmp_path):
    photo, turned = make_image(), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # as a phone saves what was held upright
    photo.save(tmp_path / "photo.jpg", exif=turned)
    code = f"import sys\nsys.modules.update(dict.fromkeys({modules_beyond_transformers()}))\n"
    for name, folder in models.items():
        assert "(public)" in client.push("model", folder, f"org/{name}", "--tag", "v1", "--public")
        sent = client.hub.files(f"org/{name}", revision="v1")
        assert sent["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert {"config.json", "preprocessor_config.json", f"modeling_{name}.py"} <= set(sent)
        assert {"pipeline_unconceal.py", "refine.py", "cutout.py"} <= set(sent)
        assert "notes.txt" not in sent, "foreign files are sent"
        three_lines, parts = re.findall(r"```python\n(.*?)```", sent["README.md"].decode(), re.DOTALL)
        assert len([line for line in three_lines.splitlines() if line.strip()]) == 3
        code += (
            f"{three_lines}\n{parts}\nassert (mask.size, mask.mode) == ({photo.size[::-1]}, 'L'), mask\n"
            f"mask.save('{name}.png')\nimport numpy\n"
            "assert abs(probs.numpy() * 255 - numpy.asarray(mask)).max() < 0.51\n"
        )
    # In a fresh process with an empty cache and no token.
    environment = client.hub.environment(tmp_path / "home", token=None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, folder in models.items():
        expected = load(folder, "cpu").segment(tmp_path / "photo.jpg")
        assert expected.std() > 0.01, "too flat to tell"
        assert np.abs(np.asarray(Image.open(tmp_path / f"{name}.png")) - 255 * expected).max() < 0.51
    client.run(
        "from unconceal.hub.cards import is_on_hub\n"
        "assert is_on_hub('org/opds', 'model')\n"
        "assert not is_on_hub('org/opds', 'dataset') and not is_on_hub('data/mine', 'dataset')"
    )


def test_pushed_data_set_is_loaded_and_streamed(client, data):
    client.push("dataset", data, "org/scenes")
    card = RepoCard(client.hub.files("org/scenes", "dataset")["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert "## Features" in card.text
    code = """
import numpy as np
from datasets import load_dataset
streamed = load_dataset("org/scenes", streaming=True)
assert {split: len(list(rows)) for split, rows in streamed.items()} == {"train": 3, "val": 2}
row = next(iter(streamed["val"]))
assert row["image"].size == row["mask"].size == (32, 32), row
assert row["mask"].mode == "L" and set(np.unique(row["mask"])) == {0, 255}
downloaded = load_dataset("org/scenes", split="val")
assert np.array_equal(np.asarray(downloaded[0]["mask"]), np.asarray(row["mask"]))
"""
    client.run(code)


def test_space_is_pushed_without_hidden_files_and_leftovers(client, space):
    assert "(private)" in client.push("space", space, "org/demo")
    again = client.push("space", space, "org/demo", "--public")
    assert "(public)" in again and "nothing has changed" in again
    assert "(private)" in client.push("space", space, "org/demo", "--private")
    assert set(client.hub.files("org/demo", "space")) == {".gitattributes", "README.md", "app.py", "examples/one.txt"}


# ---- whole or not at all --------------------------------------------------------------------------------------------


def test_interrupted_push_is_completed_by_the_same_command(client, models):
    hub, command = client.hub, ["model", models["run"], "org/cut", "--tag", "v1"]
    weights = (models["run"] / "model.safetensors").stat().st_size
    empty = {".gitattributes"}

    def count_uploads() -> int:
        return sum(request.startswith("PUT /lfs/model/org/cut/") for request in hub.requests)

    # In the middle of the weights.
    hub.fail_after(weights // 2)
    said = client.refuse(*command)
    assert "cut off" in said and "rerun the command" in said
    hub.start()
    assert set(hub.files("org/cut")) == empty
    assert "org/cut" in client.fail("from unconceal.api import load\nload('org/cut')")

    # In the middle of the commit, after the weights.
    before = count_uploads()
    hub.fail_after(weights + 100_000)
    client.refuse(*command)
    hub.start()
    assert set(hub.files("org/cut")) == empty
    after = count_uploads()
    assert after == before + 1

    assert "(private)" in client.push(*command)
    assert "nothing has changed" in client.push(*command)
    assert count_uploads() == after, "uploaded files were sent again"
    assert hub.files("org/cut", revision="v1") == hub.files("org/cut")
    assert hub.files("org/cut")["model.safetensors"] == (models["run"] / "model.safetensors").read_bytes()


def test_second_push_replaces_the_first_and_the_tag_keeps_it(client, models):
    def push_srs(*options):
        return ["model", models["srs"], "org/net", *options]

    client.push("model", models["run"], "org/net", "--tag", "v1")
    foreign, former = ("handler.py", "examples/losses.py", "adapter/model.safetensors"), "foreground.py"
    client.run(
        "from huggingface_hub import HfApi\n"
        f"for name in {(*foreign, former)}:\n"
        "    HfApi().upload_file(repo_id='org/net', path_or_fileobj=b'text', path_in_repo=name)"
    )
    before = client.hub.files("org/net")
    client.push(*push_srs("--revision", "try/srs"))
    assert "tag v1 already" in client.refuse(*push_srs("--tag", "v1"))
    assert "a tag v1, which cannot be a branch" in client.refuse(*push_srs("--revision", "v1"))
    assert client.hub.files("org/net") == before, "a refused push changed something"
    commits = client.hub.count_commits("org/net")
    said = client.push(*push_srs("--tag", "v2", "--public"))
    assert client.hub.count_commits("org/net") == commits + 1
    assert [name for name in ("removed", "modeling_run.py", "selective_scan.py", former) if name not in said] == []
    for revision, has, has_not in (
        ("v1", "modeling_run.py", "modeling_srs.py"),
        ("try/srs", "modeling_srs.py", "modeling_run.py"),
        ("v2", "modeling_srs.py", "selective_scan.py"),
    ):
        files = client.hub.files("org/net", revision=revision)
        assert has in files and has_not not in files, revision
    assert set(foreign) <= set(files), "foreign files are gone"
    for revision, name in (("v1", "Run"), ("try/srs", "Srs"), ("main", "Srs")):
        client.run(
            "from unconceal.api import load\n"
            f"model = load('org/net', 'cpu', revision={revision!r}).model\n"
            f"assert type(model).__name__ == '{name}ForImageSegmentation', model"
        )


def test_second_push_keeps_license_and_results_of_the_card(client, models, tmp_path):
    results = write_results(tmp_path / "results", models["srs"])
    push = ["model", models["srs"], "org/kept"]
    client.push(*push, "--license", "cc-by-4.0", "--results", results)
    assert "nothing has changed since" in client.push(*push)
    second = ModelCard(client.hub.files("org/kept")["README.md"].decode())
    assert second.data.eval_results and second.data.model_name == "kept" and "0.500" in second.text
    # Other weights: the license stays, the numbers do not hold.
    said = client.push("model", models["run"], "org/kept")
    assert re.search("replaced README.md; commit [0-9a-f]+ has the one before", said)
    card = ModelCard(client.hub.files("org/kept")["README.md"].decode())
    assert card.data.license == "cc-by-4.0" and "`cc-by-4.0`, as stated" in card.text
    assert card.data.eval_results is None and "None were measured." in card.text


def test_cards_edited_on_the_hub_are_not_replaced(client, models, data):
    def edit(repo_id: str, repo_type: str, change: str):
        client.run(
            "from huggingface_hub import HfApi, hf_hub_download\nfrom pathlib import Path\n"
            f"repo = {{'repo_id': {repo_id!r}, 'repo_type': {repo_type!r}}}\n"
            "text = Path(hf_hub_download(**repo, filename='README.md', force_download=True)).read_text()\n"
            f"HfApi().upload_file(**repo, path_or_fileobj=({change}).encode(), path_in_repo='README.md')"
        )

    for kind, folder in (("model", models["srs"]), ("dataset", data)):
        repo_id = f"org/edited-{kind}"
        client.push(kind, folder, repo_id)
        for change in ("text + 'Thanks.'", "text.replace('---\\n', '---\\nlicense_name: mine\\n', 1)"):
            edit(repo_id, kind, change)
            before = client.hub.files(repo_id, kind)
            assert f"the card of {repo_id} was written or edited there" in client.refuse(kind, folder, repo_id)
            assert client.hub.files(repo_id, kind) == before
    own = models["srs"] / "own.md"
    own.write_text("---\nlicense: mit\n---\n# Mine\n")
    said = client.push("model", models["srs"], "org/edited-model", "--card", own)
    assert re.search("replaced README.md; commit [0-9a-f]+ has the one before", said)
    # What the Hub itself writes holds nothing but a license.
    edit("org/edited-model", "model", "'---\\nlicense: mit\\n---\\n'")
    client.push("model", models["srs"], "org/edited-model")
    assert ModelCard(client.hub.files("org/edited-model")["README.md"].decode()).data.license == "mit"


def test_card_names_the_oldest_transformers():
    (oldest,) = re.findall(r'"transformers>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert f"transformers from {oldest} on" in cards.use_on_hub("org/net")


def test_signature_covers_the_whole_card(caplog):
    card = "---\nlicense: mit\n---\n# Net\n"
    signed = sign(card, "abc")
    assert signed.startswith(card) and kept_license(signed, "org/net") == "mit"
    assert kept_license(None, "org/net") is None and kept_license(sign("---\nlicense: unknown\n---\n"), "o/n") is None
    for edited in (signed.replace("mit", "gpl-3.0"), signed + "more\n", "more\n" + signed, card, "---\n{[\n---\n"):
        with refuse("the card of org/net was written or edited there"):
            kept_license(edited, "org/net")
    assert with_kept_results(card, signed, "abc") == card
    row = "{type: iou, value: 0.5}"
    task, dataset = "{type: image-segmentation}", "{type: x, name: x}"
    header = f"model-index: [{{name: a, results: [{{task: {task}, dataset: {dataset}, metrics: [{row}]}}]}}]"
    measured = sign(f"---\n{header}\n---\n# Net\n\n## Results\n\n0.5\n\n## Limits\n\nOld.\n", "abc")
    new = "---\nlicense: mit\n---\n# Net\n\n## Results\n\nNone.\n\n## Limits\n\nNew.\n"
    kept = ModelCard(with_kept_results(new, measured, "abc"))
    assert kept.text.split("# Net")[1] == "\n\n## Results\n\n0.5\n\n## Limits\n\nNew.\n"
    assert [one.metric_value for one in kept.data.eval_results] == [0.5] and kept.data.license == "mit"
    assert with_kept_results(new, measured, "other") == new and "are of other weights and are dropped" in caplog.text


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_refusals_of_the_hub_are_one_line_each(client, space):
    def refused(repo_id: str = "org/refused", *options: str, **token) -> str:
        return client.refuse("space", space, repo_id, *options, **token)

    assert "HF_TOKEN" in refused(token=None)
    assert "refuses the token" in refused(token="hf_other")
    assert "does not let this token write to somebody/demo" in refused("somebody/demo")
    assert "expected owner/name" in refused("demo")
    assert "expected owner/name" in refused("org/demo--")
    for option, name in (("--tag", "bad tag"), ("--tag", "a..b"), ("--tag", "main"), ("--revision", "refs/heads/x")):
        assert name in refused("org/refused", option, name)
    assert "--message is empty" in refused("org/refused", "--message", "")
    (space / "README.md").write_text(f"---\nsdk: gradio\nshort_description: {'long ' * 20}\n---\n")
    assert "refuses the card of org/refused" in refused()
    # A missing repository, with and without a Hub.
    opened = "from unconceal.api import load\nload('org/absent')"
    assert "org/absent" in client.fail(opened)
    client.hub.stop()
    try:
        assert client.hub.url in refused("org/offline")
        assert "org/absent" in client.fail(opened)
    finally:
        client.hub.start()


def refuse(*parts: str):
    return pytest.raises(UserError, match=".*".join(map(re.escape, parts)))


def test_models_that_are_refused(models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with refuse("not a folder"):
        stage_model(tmp_path / "absent", "org/net", out)
    with refuse("without config.json"):
        stage_model(tmp_path, "org/net", out)
    for options, says in (
        ({"results": [tmp_path]}, "cannot read"),
        ({"card": tmp_path / "absent.md"}, "cannot read"),
        ({"card": models["srs"] / "notes.txt"}, "no header"),
    ):
        with refuse(says):
            stage_model(models["srs"], "org/net", out, **options)


def write_results(folder: Path, model: Path, **changes) -> Path:
    folder.mkdir()
    results = {
        "protocol": "segmentation",
        "results": {"num_images": 2, "iou": 0.5, "f1": 0.6, "precision": 0.7, "recall": 0.8},
        "sources": {"synthetic/camouflage": 2},
        "name": "a run",
        "data": "org/scenes",
        "split": "val",
        "options": {"threshold": 0.5},
        "weights": weights_digest(load(model, device="cpu").model),
        "command": f"unconceal evaluate --model={model} --data org/scenes",
        "date": "2026-01-02T03:04:05+00:00",
        "git_commit": "0123456789",
        **changes,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_foreign_results_are_refused(models, tmp_path):
    def stage(**options):
        return stage_model(models["srs"], "org/net", tmp_path, **options)

    for name, model, changes, says in (
        ("other", "run", {}, "no results of the weights in"),
        ("masks", "srs", {"weights": None}, "no results of the weights in"),  # as for mask files
        ("part", "srs", {"limit": 3}, "covers only the first 3 images"),
    ):
        with refuse(says):
            stage(results=[write_results(tmp_path / name, models[model], **changes)])


def test_results_on_images_of_the_training_are_refused(models, tmp_path):
    model = shutil.copytree(models["srs"], tmp_path / "model")
    for seed, got, says in (
        ("null", {"data": "elsewhere/x", "split": "train"}, "the network was trained on train of elsewhere/x"),
        ("3", {"data": "x", "split": "val"}, "a random part of x; --split-seed 3 scores the other part"),
    ):
        phases = "phases: {segmentation: {epochs: 1}}"
        write_progress(model, f"network: srs\noutput_dir: o\ndata: {{path: data/x, split_seed: {seed}}}\n{phases}")
        with refuse(says):
            stage_model(model, "org/net", tmp_path, results=[write_results(tmp_path / seed, model, **got)])


def test_networks_that_do_not_segment_are_refused_in_one_line(models, tmp_path, capfd):
    saved = json.loads((models["srs"] / "config.json").read_text())
    for saved_as in ("SrsForReconstruction", "MscanBackbone", "ResNetForImageClassification"):
        (tmp_path / "config.json").write_text(json.dumps({**saved, "architectures": [saved_as]}))
        with refuse(f"which holds {saved_as}, expected one of", "SrsForImageSegmentation"):
            stage_model(tmp_path, "org/net", tmp_path / "out")
    assert capfd.readouterr().err == ""
    (tmp_path / "config.json").write_text("null")
    with refuse("cannot read", "config.json"):
        stage_model(tmp_path, "org/net", tmp_path / "out")


def write_progress(checkpoint: Path, recipe: str, **facts):
    """Write the record that training leaves beside its weights."""
    (checkpoint / "wanted.yaml").write_text(recipe)
    recipe = load_recipe(checkpoint / "wanted.yaml")
    sets = [describe_set(path, {"train": range(3), "val": range(2)}) for path in recipe.data.paths]
    progress = Progress("segmentation", recipe=asdict(recipe), epoch=6, step=60, **{"data": sets, **facts})
    (checkpoint / "progress.json").write_text(json.dumps(asdict(progress)))


def test_card_states_the_recorded_facts(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "is_on_hub", lambda name, _: name in ("microsoft/resnet-50", "org/scenes"))
    run = tmp_path / "run"
    checkpoint = shutil.copytree(models["run"], run / "segmentation" / "best")
    recipe = (
        f"network: run\noutput_dir: {run}\ndata: {{path: {data}}}\nprotocol: segmentation\n"
        "phases: {segmentation: {epochs: 7, batch_size: 4, init_backbone_from: other/encoder}}\n"
    )
    start = {"part": "encoder", "source": "microsoft/resnet-50", "sha256": "a" * 64, "from_hub": True}
    write_progress(checkpoint, recipe, start=start, sessions=[{**SESSION, "mixed_precision": "bf16"}])
    # What the recipe and the data set say now is not what happened.
    (run / "recipe.yaml").write_text(recipe.replace("epochs: 7", "epochs: 99"))
    results = [
        write_results(tmp_path / "results", checkpoint),
        write_results(tmp_path / "refined", checkpoint, refine="auto"),
    ]
    out = tmp_path / "out"
    out.mkdir()
    upload = stage_model(checkpoint, "org/run-scenes", out, results=results, license="cc-by-4.0")
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.base_model == ["microsoft/resnet-50"]
    assert card.data.pipeline_tag == "image-segmentation"
    rows = [row for row in card.data.eval_results if row.metric_type == "iou"]
    assert [row.metric_value for row in rows] == [0.5, 0.5]
    assert [row.dataset_type for row in rows] == ["org/scenes"] * 2
    assert [row.metric_args for row in rows] == [None, ["refine auto"]]
    assert all("protocol segmentation" in row.metric_name for row in rows)
    assert "# run-scenes\n" in card.text
    training, figures = card.text.split("## Results")[0], card.text.split("## The paper's figures")[1]
    assert "3 in `train`, 2 in `val`" in training
    assert "Terms: Apache-2.0" in training
    assert "| 6 of 7 (60 steps) |" in training and "sgd" in training and "epochs: 99" not in training
    assert f"Start: encoder from `microsoft/resnet-50`, SHA-256 of these weights `{'a' * 64}`" in training
    assert "bf16 mixed precision" in training  # the recipe leaves it open
    assert "other/encoder" not in training.split("<details>")[0]
    measured = card.text.split("## Results")[1].split("## The paper's figures")[0]
    assert "0.500" in measured and "run-scenes, refine auto" in measured
    assert "best checkpoint was chosen on `val`" in measured
    assert "--model=.../best" in measured
    assert "none of them was measured" in figures and "COD10K" in figures
    assert "2025" in card.text.split("## Citation")[1]
    check_no_paths(upload, tmp_path)


def check_no_paths(upload, folder: Path):
    """Check for local paths in the files of an upload."""
    for name, path in upload.files.items():
        if path.suffix not in (".safetensors", ".parquet"):
            text = path.read_text()
            assert str(folder) not in text and tempfile.gettempdir() + "/" not in text, name


def test_card_of_a_model_without_record_says_so(models, tmp_path):
    stage_model(models["srs"], "org/net", tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("Not on record.") == 2
    for part in ("None were measured.", "no license was stated", "no medical device"):
        assert part in text
    assert "split again" not in text and "random weights" not in text
    assert "How these weights were made is not on record" in text


def test_record_of_other_weights_does_not_count(models, tmp_path):
    checkpoint = shutil.copytree(models["run"], tmp_path / "net")
    recipe = "network: run\noutput_dir: x\ndata: {path: x}\nphases: {segmentation: {epochs: 7}}\n"
    own = weights_digest(load(checkpoint, device="cpu").model)
    for weights, says in ((own, "6 of 7"), ("0" * 64, "Not on record.")):
        write_progress(checkpoint, recipe, weights=weights)
        out = tmp_path / weights[:3]
        out.mkdir()
        stage_model(checkpoint, "org/net", out)
        assert says in (out / "README.md").read_text()


def test_cards_of_converted_weights_say_what_they_are(models, tmp_path, monkeypatch):
    published = tmp_path / "RUN_authors.pth"
    published.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    converted, tuned = tmp_path / "converted", tmp_path / "tuned"
    segmenter = load(models["run"], device="cpu")
    save_converted(converted, [published], "unconceal convert", segmenter.model, segmenter.processor)
    shutil.copytree(models["run"], tuned)
    start = {"part": "network", "source": str(converted), "sha256": "b" * 64, "before": read_record(converted)}
    recipe = "network: run\noutput_dir: x\ndata: {path: x}\nphases: {segmentation: {epochs: 7}}\n"
    write_progress(tuned, recipe, start=start)
    shutil.copytree(converted, tmp_path / "kept")
    shutil.rmtree(converted)  # the record of the training holds it
    for folder, first in ((tmp_path / "kept", "These are published weights in another form"), (tuned, "Trained with")):
        out = tmp_path / f"out-{folder.name}"
        out.mkdir()
        stage_model(folder, "org/net", out)
        text = (out / "README.md").read_text()
        assert first in text and f"`RUN_authors.pth`, SHA-256 `{digest}`" in text
        assert ("Trained with" in text) == (folder == tuned)
        assert "terms of the published weights" in text and str(tmp_path) not in text


def test_card_says_which_images_chose_the_checkpoint(models, tmp_path):
    checkpoint = shutil.copytree(models["run"], tmp_path / "net")
    paths = "{path: [data/scenes, org/more], split_seed: 3}"
    recipe = f"network: run\noutput_dir: x\ndata: {paths}\nphases: {{segmentation: {{epochs: 1}}}}\n"
    write_progress(checkpoint, recipe)

    def stage(split_seed: int | None, data: str | None = "org/scenes") -> str:
        name = f"{split_seed}{data}".replace("/", "-")
        results = write_results(tmp_path / name, models["run"], division_seed=split_seed, data=data)
        out = tmp_path / f"out{name}"
        out.mkdir()
        stage_model(checkpoint, "org/net", out, [results])
        return (out / "README.md").read_text()

    with refuse("tells nothing of new images", "--split-seed 3 scores the other part"):
        stage(None)
    text = stage(3, "data/others")
    assert "split again at random (seed 3): the `val` of the data set is not the one that chose" in text
    assert "- Start: random weights" in text
    assert "expect less on other images" not in text
    for data, is_same in (("org/scenes", True), (None, True), ("more/", True)):
        assert ("expect less on other images" in stage(3, data)) == is_same, data


def test_data_set_without_an_open_license_needs_a_statement(data, tmp_path):
    closed, card = tmp_path / "closed", (data / "README.md").read_text()
    closed.mkdir()
    (closed / "data").symlink_to(data / "data")
    for stated in ("other", "research-only"):
        (closed / "README.md").write_text(card.replace("license: apache-2.0", f"license: {stated}"))
        with refuse("no license", f"it says {stated}", "Apache-2.0", "--may-redistribute"):
            stage_dataset(closed, "org/scenes", tmp_path)
        upload = stage_dataset(closed, "org/scenes", tmp_path, may_redistribute=True)
        assert "states that the makers allow it" in upload.files["README.md"].read_text()
    (closed / "README.md").write_text(card.replace("license: apache-2.0", "license: other"))
    upload = stage_dataset(closed, "org/scenes", tmp_path, license="cc-by-4.0")
    sent = RepoCard.load(upload.files["README.md"])
    assert sent.data.license == "cc-by-4.0"
    assert "states the license `cc-by-4.0`" in sent.text
    # A second push keeps what the first one stated.
    present = upload.files["README.md"].read_text()
    again = stage_dataset(closed, "org/scenes", tmp_path, present=present)
    assert again.files["README.md"].read_text() == present


def test_open_license_is_kept_and_paths_are_not(data, tmp_path):
    with refuse("states apache-2.0"):
        stage_dataset(data, "org/scenes", tmp_path, license="mit")
    upload = stage_dataset(data, "org/scenes", tmp_path)
    assert "This copy" not in upload.files["README.md"].read_text()
    check_no_paths(upload, data)


def test_files_that_are_no_part_of_a_data_set_are_named(data, tmp_path, caplog):
    source = Path(shutil.copytree(data, tmp_path / "source"))
    stage_dataset(source, "org/scenes", tmp_path)
    assert caplog.text == ""
    for name in ("LICENSE", "data/more.csv", "figures/one.png", ".cache/x"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).touch()
    upload = stage_dataset(source, "org/scenes", tmp_path)
    assert "LICENSE" not in upload.files
    assert f"3 other files in {source} are not sent, such as LICENSE" in caplog.text


def test_data_sets_that_are_refused(data, tmp_path):
    with refuse("not a folder"):
        stage_dataset(tmp_path / "absent", "org/scenes", tmp_path)
    with refuse("`unconceal prepare` made"):
        stage_dataset(tmp_path, "org/scenes", tmp_path)
    broken, card = tmp_path / "broken", (data / "README.md").read_text()
    (broken / "data").mkdir(parents=True)
    (shard,) = (data / "data").glob("val-*")
    for header, size, *says in (
        ("---\nlicense: mit\n---\n", None, "no counts (dataset_info)"),
        (card, None, "counts", "'train': 3", "hold", "'train': 0"),
        (card, 1000, "cannot read", shard.name),
    ):
        (broken / "README.md").write_text(header)
        (broken / "data" / shard.name).write_bytes(shard.read_bytes()[:size])
        with refuse(*says):
            stage_dataset(broken, "org/scenes", tmp_path)


def test_spaces_that_are_refused(tmp_path):
    with refuse("no README.md"):
        stage_space(tmp_path, "org/demo")
    (tmp_path / "host").symlink_to("/etc/hostname")
    for header, app, says in (
        ("title: x", "app.py", "names no sdk"),
        ("sdk: gradio\napp_file: main.py", "app.py", "no main.py"),
        ("sdk: static", "app.py", "no index.html"),
        ("sdk: static", "index.html", "host is a link that leaves"),
    ):
        (tmp_path / app).touch()
        (tmp_path / "README.md").write_text(f"---\n{header}\n---\n")
        with refuse(says):
            stage_space(tmp_path, "org/demo")


def test_dry_run_lists_and_sends_nothing(models, tmp_path, capsys):
    command, card = ["push", "model", str(models["srs"]), "org/net"], tmp_path / "card.md"
    assert main([*command, "--dry-run", "--tag", "v1", "--write-card", str(card)]) == 0
    said = capsys.readouterr().out
    assert "model.safetensors" in said
    assert re.search(r"would send \d+ files", said) and "private if it is new, tag v1" in said
    assert "the Hub could not be asked" in said
    assert card.read_text().startswith("---\n")
    written = card.read_text()
    with refuse("card.md exists"):
        main([*command, "--dry-run", "--write-card", str(card)])
    assert card.read_text() == written
    with refuse("--write-card without --dry-run"):
        main([*command, "--write-card", str(card)])


def test_dry_run_lets_the_hub_check_the_card(models, monkeypatch, capsys):
    def validate(card: RepoCard, repo_type: str):
        if card.data.license != "mit":
            raise ValueError('"license" must be one of [mit]')

    monkeypatch.setattr(RepoCard, "validate", validate)
    command = ["push", "model", str(models["srs"]), "org/net", "--dry-run", "--license"]
    with refuse("the Hub refuses the card of org/net", "license"):
        main([*command, "foo"])
    assert "would send" not in capsys.readouterr().out
    main([*command, "mit"])
    said = capsys.readouterr().out
    assert "would send" in said and "could not be asked" not in said


def test_card_names_the_data_of_earlier_trainings(models, tmp_path):
    def describe(title: str, number: int, path: str) -> dict:
        return {"path": path, "from_hub": False, "images": {"train": number, "val": 2}, "title": title}

    recipe = "network: run\noutput_dir: x\ndata: {path: x}\nphases: {segmentation: {epochs: 1}}\n"
    first, second = (shutil.copytree(models["run"], tmp_path / name) for name in ("first", "second"))
    write_progress(first, recipe, data=[describe("Animals", 30, "old/animals"), describe("Polyps", 9, "old/polyps")])
    start = {"part": "network", "source": str(first), "sha256": "a" * 64, "before": read_record(first)}
    write_progress(second, recipe, start=start, data=[describe("Polyps", 9, "new/polyps")])
    out = tmp_path / "out"
    out.mkdir()
    stage_model(second, "org/net", out)
    training = (out / "README.md").read_text().split("## Training data")[1].split("## Training\n")[0]
    assert training.count("Polyps") == 1  # the same set in another folder
    own, earlier = training.split("Seen in an earlier training only:")
    assert "Polyps" in own and "9 in `train`" in own
    assert "Animals" in earlier and "30 in `train`" in earlier


def test_card_names_each_of_two_equal_data_sets(models, tmp_path):
    checkpoint = shutil.copytree(models["run"], tmp_path / "net")
    both = [{"path": f"data/{name}", "from_hub": False, "title": "Mine", "images": {"train": 9}} for name in "ab"]
    data = "{path: [data/a, data/b], weights: [3, 1]}"
    recipe = f"network: run\noutput_dir: x\ndata: {data}\nphases: {{segmentation: {{epochs: 1}}}}\n"
    write_progress(checkpoint, recipe, data=both)
    out = tmp_path / "out"
    out.mkdir()
    stage_model(checkpoint, "org/net", out)
    text = (out / "README.md").read_text()
    assert "Shares of the training samples: Mine (a) 75%, Mine (b) 25%." in text
    assert text.count("9 in `train`") == 2


def test_damaged_records_are_one_line(models, tmp_path):
    recipe = "network: run\noutput_dir: x\ndata: {path: x}\nphases: {segmentation: {epochs: 1}}\n"
    write_progress(tmp_path, recipe, start={"part": "network", "source": "org/net", "sha256": "a" * 64})
    segmenter, record = load(models["run"], device="cpu"), read_record(tmp_path)
    card = cards.make_model_card(segmenter, "org/net", cards.from_record(record))
    assert "Start: network from `net`" in card
    for damage in (
        {"recipe": {**record["recipe"], "phases": None}},
        {"recipe": {**record["recipe"], "colour": 1}},
        {"recipe": [1]},
        {"data": [1]},
        {"data": [{"path": "x", "from_hub": False}]},
        {"start": {"part": "network"}},
        {"start": {**record["start"], "before": {"files": []}}},
        {"colour": 1},
    ):
        with refuse("progress.json", "is damaged", "restore it, or remove it") as caught:
            cards.make_model_card(segmenter, "org/net", cards.from_record({**record, **damage}))
        assert "\n" not in str(caught.value)
