"""Segmenting many images: overlap, several processes, data sets."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from common import TWO_PROCESSES, noise, rejected
from datasets import Dataset, Features, Image, Value, load_dataset
from hub_server import HubServer
from PIL import Image as PilImage

from unconceal import segmenting_data
from unconceal.api import load
from unconceal.data.loading import load_splits
from unconceal.data.write import FEATURES
from unconceal.segmenting import Job, Runner, digest_of, mark, plan_jobs, unfinished
from unconceal.segmenting_data import DataTarget, Shard, shards_of_data
from unconceal.utils.errors import UserError
from unconceal.utils.signatures import sign
from unconceal.utils.threads import map_ahead


@pytest.fixture
def photos(tmp_path):
    """Return a folder of 7 images and a damaged one in their middle."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(7):
        noise(40 + i, 70, seed=i).save(folder / f"{i}.png")
    (folder / "3b.png").write_text("damaged")
    return folder


@pytest.fixture
def rows(tmp_path):
    """Return a data set of 3 files with 9 images, one damaged."""
    folder = tmp_path / "rows"
    for part in range(3):
        files = {"image": [], "id": []}
        for i in range(part * 3, part * 3 + 3):
            noise(40 + i, 70, seed=i).save(tmp_path / "one.png")
            files["image"].append({"bytes": b"damaged" if i == 4 else (tmp_path / "one.png").read_bytes()})
            files["id"].append(f"case/{i}")
        features = Features({"image": Image(), "id": Value("string")})
        Dataset.from_dict(files, features).to_parquet(folder / f"test-{part:05d}-of-00003.parquet")
    return folder


def launch(checkpoint, *args, launcher=TWO_PROCESSES, **variables):
    """Run `unconceal segment` in two processes."""
    command = [sys.executable, *launcher, "-m", "unconceal", "segment", *map(str, args), "--model", str(checkpoint)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.p*")}


def test_results_come_in_order_and_only_so_many_are_ahead():
    drawn = []

    def items():
        for i in range(20):
            drawn.append(i)
            yield i

    def slower_at_first(i):
        time.sleep(0.02 * (i == 0))
        return i

    results = map_ahead(slower_at_first, items(), 3)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(drawn) == 8
    results.close()
    assert list(map_ahead(str, range(4), 0)) == list(map_ahead(str, range(4), 9)) == ["0", "1", "2", "3"]


def test_an_error_ends_the_calls_in_its_turn():
    started, results = [], []

    def fail_at_three(i):
        started.append(i)
        if i == 3:
            raise UserError("three")
        return i

    with rejected("three"):
        results.extend(map_ahead(fail_at_three, range(99), 2))
    assert len(started) < 8


@pytest.mark.parametrize("refine", ["never", "always"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_overlapped_outputs_are_those_in_turn(checkpoint, photos, tmp_path, capsys, refine, batch_size):
    found, said = [], []
    segmenter = load(checkpoint, "cpu")
    capsys.readouterr()
    for num_threads in (0, 1, 3):
        out = tmp_path / f"out{num_threads}"
        runner = Runner(segmenter, batch_size, refine, num_threads=num_threads)
        plan = plan_jobs([photos], out, ["mask", "overlay"])
        runner.write_files([Job(source, source, outputs) for source, outputs in plan.items()], out)
        assert (runner.tally.done, runner.tally.failed) == (7, 1)
        assert 0 < runner.tally.network_seconds < runner.tally.seconds
        found.append(contents(out))
        said.append(capsys.readouterr().err)
    assert len(found[0]) == 14
    assert found[0] == found[1] == found[2]
    assert said[0] == said[1] == said[2] == f"failed: {photos / '3b.png'}: not an image file that Pillow can read\n"


def test_ctrl_c_leaves_whole_files(checkpoint, photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    segmenter = load(checkpoint, "cpu")
    stream = type(segmenter).stream

    def interrupted(*args):
        for i, mask in enumerate(stream(*args)):
            if i == 3:
                raise KeyboardInterrupt
            yield mask

    monkeypatch.setattr(type(segmenter), "stream", interrupted)
    jobs = [Job(source, source, outputs) for source, outputs in plan_jobs([photos], out, ["mask"]).items()]
    with pytest.raises(KeyboardInterrupt):
        Runner(segmenter).write_files(jobs, out)
    assert {path.name for path in out.iterdir()} <= {"0.png", "1.png", "2.png"}
    for path in out.iterdir():
        with PilImage.open(path) as image:
            image.load()


ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(TWO_PROCESSES, id="torchrun", marks=pytest.mark.thorough),
        pytest.param(ACCELERATE, id="accelerate"),
    ],
)
def test_two_processes_share_a_folder(checkpoint, photos, segment, tmp_path, launcher):
    segment(photos, "--out", tmp_path / "one")
    (tmp_path / "two").mkdir()
    for name in ("1.png", "4.png"):  # what an earlier run left
        shutil.copy(tmp_path / "one" / name, tmp_path / "two")
    done = launch(checkpoint, photos, "--out", tmp_path / "two", launcher=launcher)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"8 images: 5 segmented .*, 2 skipped, .*, 1 failed, .* in the network\n", done.stdout)
    assert done.stderr.count("failed: ") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_a_dead_process_fails_the_job_and_a_second_run_goes_on(checkpoint, rows, segment, tmp_path):
    """The second process is killed after its first shard."""
    code = """
import os, signal, sys
from unconceal import segmenting_data
from unconceal.__main__ import entry
write = segmenting_data._write_shard
def dying(*args):
    write(*args)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
segmenting_data._write_shard = dying
sys.argv[0] = "unconceal"
entry()
"""
    (tmp_path / "dying.py").write_text(code)
    target = tmp_path / "masks"
    call = ["--data", rows, "--split", "test", "--to-data"]
    command = [sys.executable, *TWO_PROCESSES, tmp_path / "dying.py", "segment", *call, target, "--model", checkpoint]
    done = subprocess.run(list(map(str, command)), env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True)
    assert done.returncode not in (0, 2)
    left = {path.name for path in (target / "data").glob("test-*")}
    assert "test-00001-of-00003.parquet" not in left
    for name in left:
        assert pq.read_table(target / "data" / name).num_rows == 3
    assert not (target / "README.md").exists()

    code, stdout, stderr = segment(*call, target)
    assert code == 1
    assert "1 failed" in stdout and stderr.count("failed: case/4: ") == 1
    segment(*call, tmp_path / "one")
    names = {f"test-{i:05d}-of-00003.parquet" for i in range(3)}
    assert {path.name for path in (target / "data").glob("[!.]*")} == names  # the killed one left a hidden file
    for name in names:
        one, two = (pq.read_table(folder / "data" / name) for folder in (tmp_path / "one", target))
        assert one.equals(two)


def test_a_data_set_becomes_a_data_set(rows, segment, tmp_path):
    target = tmp_path / "masks"
    code, stdout, stderr = segment("--data", rows, "--split", "test", "--to-data", target, "--batch-size", 2)
    assert code == 1
    assert stdout.startswith(f"9 images: 8 segmented into {target}, 1 failed")
    assert "failed: case/4: not an image" in stderr
    made = load_dataset(str(target), split="test", cache_dir=tmp_path / "cache")
    assert made.features == FEATURES
    assert made["id"][:] == [f"case/{i}" for i in range(9) if i != 4]
    assert set(made["source"]) == {"rows"}
    # The same masks as files.
    segment("--data", rows, "--split", "test", "--out", tmp_path / "out")
    for row in made:
        assert row["mask"].tobytes() == PilImage.open(tmp_path / "out" / f"{row['id']}.png").tobytes()
    assert "8 skipped" in segment("--data", rows, "--split", "test", "--out", tmp_path / "out")[1]
    # Nothing is done again, and another input does not mix.
    before = contents(target)
    assert "3 shards skipped" in segment("--data", rows, "--split", "test", "--to-data", target)[1]
    assert contents(target) == before
    (rows / "test-00002-of-00003.parquet").unlink()
    with rejected("which is not of this data"):
        segment("--data", rows, "--split", "test", "--to-data", target)


def test_rows_without_ids_have_the_names_that_evaluation_gives_them(segment, tmp_path):
    noise().save(tmp_path / "one.png")
    image = {"bytes": (tmp_path / "one.png").read_bytes()}
    data = Dataset.from_dict(
        {"image": [image] * 7, "mask": [image] * 7}, Features({"image": Image(), "mask": Image()})
    )
    for number, rows in enumerate(([0, 1], [2, 3, 4], [5, 6])):
        data.select(rows).to_parquet(tmp_path / "rows" / f"test-{number:05d}-of-00003.parquet")
    loaded = load_splits(str(tmp_path / "rows"), ["test"])["test"]
    assert segment("--data", tmp_path / "rows", "--split", "test", "--to-data", tmp_path / "masks")[0] == 0
    made = load_dataset(str(tmp_path / "masks"), split="test", cache_dir=tmp_path / "cache")
    assert made["id"][:] == loaded["id"][:] == [f"test-{row}" for row in range(7)]
    assert made["source"][:] == loaded["source"][:] == ["rows"] * 7
    jobs = shards_of_data(str(tmp_path / "rows"), "test")[2].jobs()  # as another process would read it
    assert [job.row["id"] for job in jobs] == ["test-5", "test-6"]


def test_other_settings_do_not_mix_in_a_data_set(rows, segment, tmp_path, caplog):
    """Half a data set of one model is not completed by another."""
    target, out = tmp_path / "masks", tmp_path / "out"
    call = ["--data", rows, "--split", "test"]
    segment(*call, "--to-data", target)
    before = contents(target)
    (target / "data" / "test-00001-of-00003.parquet").unlink()
    with rejected("other settings: .*, now .*threshold 0.4"):
        segment(*call, "--to-data", target, "--threshold", 0.4)
    segment(*call, "--to-data", target)
    assert contents(target) == before
    segment(*call, "--to-data", target, "--threshold", 0.4, "--overwrite")
    assert contents(target) != before
    segment(*call, "--out", out)
    with rejected("other settings"):
        segment(*call, "--out", out, "--threshold", 0.4)
    # A card with notes stays.
    (target / "README.md").write_text((target / "README.md").read_text() + "my notes\n")
    segment(*call, "--to-data", target, "--overwrite")
    assert (target / "README.md").read_text().endswith("my notes\n")
    assert "was edited" in caplog.text


def test_marks_tell_inputs_apart(tmp_path):
    out = tmp_path / "x.png"
    out.touch()
    job = Job("x", b"image", {"mask": out})
    # Earlier versions marked with the settings alone.
    for found in ("net", mark("net", digest_of(b"image"))):
        assert unfinished(job, "net", False, lambda path, found=found: found) is None
    for found, words in (
        (mark("net", digest_of(b"other")), "another input"),
        ("old", "other settings: old, now net;"),
    ):
        with rejected(words):
            unfinished(job, "net", False, lambda path, found=found: found)
    gone = replace(job, source=tmp_path / "gone.jpg")  # fails when it is opened
    assert not unfinished(gone, "net", False, lambda path: mark("net", digest_of(b"image"))).outputs


def test_shards_of_other_images_are_not_kept(photos, segment, tmp_path):
    target = tmp_path / "masks"
    segment(photos, "--to-data", target)
    before = contents(target)
    assert "1 shards skipped" in segment(photos, "--to-data", target)[1]
    noise(45, 70, seed=99).save(photos / "5.png")
    with rejected("train-00000-of-00001.parquet exists and is of another input of the same name"):
        segment(photos, "--to-data", target)
    assert contents(target) == before


def test_shards_of_others_stay(photos, rows, segment, tmp_path):
    data = tmp_path / "masks" / "data"
    data.mkdir(parents=True)
    of_user = (rows / "test-00000-of-00003.parquet").read_bytes()
    for name in ("train-00000-of-00001.parquet", "val-00000-of-00001.parquet"):
        for content in (of_user, b"no Parquet"):
            (data / name).write_bytes(content)
            for more in ([], ["--overwrite"]):
                with rejected(f"masks holds {name}, which is not of this command; choose another --to-data"):
                    segment(photos, "--to-data", tmp_path / "masks", *more)
            assert (data / name).read_bytes() == content
        (data / name).unlink()


def test_a_data_set_on_the_hub_keeps_its_splits_and_no_other_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shard, cards = "train-00000-of-00001.parquet", []
    ground_truth = sign("---\nlicense: mit\n---\n\n# Polyps\n")
    for name, replacement in {
        "check_token": lambda: None,
        "list_files": lambda *args: [f"data/{shard}"],
        "read_card": lambda *args: cards[-1] if cards else None,
        "open_file": lambda *args: (tmp_path / shard).open("rb"),
        "push": lambda upload, message: cards.append(upload.files["README.md"].read_text()),
    }.items():
        monkeypatch.setattr(segmenting_data, name, replacement)
    write_shard(tmp_path / shard, "one net")
    target = DataTarget("org/masks", "val", "another net")
    target._send(tmp_path / "val-00000-of-00001.parquet")
    assert "path: data/train-*" in cards[-1] and "path: data/val-*" in cards[-1]
    assert "Masks predicted by `another net` (val), `one net` (train). Gray" in cards[-1]
    assert target.finished([]) == {shard}
    (tmp_path / shard).write_text("no Parquet")
    for split in ("train", "val"):
        with rejected(f"org/masks holds {shard}, which is not of this command"):
            replace(target, split=split).finished([Shard(shard, lambda: iter(()))], overwrite=True)
    write_shard(tmp_path / shard, "one net")
    cards.append(ground_truth)
    with rejected("org/masks holds README.md, which is not of this command"):
        target.finished([])
    monkeypatch.undo()
    monkeypatch.setattr("unconceal.hub.push.get_token", lambda: None)
    with rejected("got no token of the Hub"):
        target.finished([])


def write_shard(path, settings):
    segmenting_data._write_shard(path, [], settings, hashlib.sha256(b"input"))


def test_the_card_names_what_made_each_split(tmp_path):
    (tmp_path / "data").mkdir()
    train, val = "train-00000-of-00001.parquet", "val-00000-of-00001.parquet"
    write_shard(tmp_path / "data" / train, "ck, threshold 0.5")
    jobs = [Shard(val, lambda: iter(()))]
    for settings, source in (
        ("ck, threshold 0.5", "Masks predicted by `ck, threshold 0.5`. Gray"),
        ("ck2", "Masks predicted by `ck, threshold 0.5` (train), `ck2` (val). Gray"),
    ):
        write_shard(tmp_path / "data" / val, settings)
        DataTarget(str(tmp_path), "val", settings).complete(jobs)
        assert source in (tmp_path / "README.md").read_text()
    write_shard(tmp_path / "data" / "train-00001-of-00002.parquet", "ck3")  # half replaced
    DataTarget(str(tmp_path), "val", "ck2").complete(jobs)
    assert "by `ck, threshold 0.5` (train), `ck2` (val), `ck3` (train)." in (tmp_path / "README.md").read_text()


def test_names_that_are_no_text(photos, segment, tmp_path):
    odd = os.fsdecode(b"\xff")
    with rejected("expected a name in UTF-8; choose another folder"):
        segment(photos, "--to-data", tmp_path / f"masks{odd}")
    (tmp_path / odd).mkdir()
    noise().save(tmp_path / odd / f"photo{odd}.png")
    assert segment(tmp_path / odd, "--to-data", tmp_path / "masks")[0] == 0
    (row,) = load_dataset(str(tmp_path / "masks"), split="train", cache_dir=tmp_path / "cache")
    assert (row["id"], row["source"]) == ("photo?", "?")
    call = [tmp_path / odd, "--out", tmp_path / "out", "--output", "cutout"]
    assert segment(*call, "--background", tmp_path / odd / f"photo{odd}.png")[0] == 0
    with PilImage.open(tmp_path / "out" / f"photo{odd}_cutout.png") as cut:
        assert "background photo?.png (" in cut.info["Comment"]


def test_files_become_a_data_set(photos, segment, tmp_path, monkeypatch):
    monkeypatch.setattr("unconceal.segmenting_data.FILES_PER_SHARD", 3)
    code, stdout, _ = segment(photos, "--to-data", tmp_path / "masks", "--split", "new")
    assert (code, "7 segmented" in stdout) == (1, True)
    made = load_dataset(str(tmp_path / "masks"), split="new", cache_dir=tmp_path / "cache")
    assert made["id"][:] == [str(i) for i in range(7)]
    assert [image.size for image in made["image"]] == [mask.size for mask in made["mask"]]
    assert json.dumps(sorted(path.name for path in (tmp_path / "masks" / "data").iterdir())).count("of-00003") == 3


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("both PATH and --data", ["photos", "--data", "rows", "--split", "test", "--out", "out"]),
        ("no image", ["--out", "out"]),
        ("both --out and --to-data", ["photos", "--out", "out", "--to-data", "more"]),
        ("--data needs --split", ["--data", "rows", "--out", "out"]),
        ("leave it out", ["photos", "--split", "test", "--out", "out"]),
        ("masks only", ["photos", "--to-data", "out", "--output", "overlay"]),
        ("absent does not exist", ["--data", "absent", "--split", "test", "--out", "out"]),
        ("cannot open split train", ["--data", "rows", "--split", "train", "--out", "out"]),
        ("give it as PATH", ["--data", "photos", "--split", "train", "--out", "out"]),
        ("which is not of this command", ["photos", "--to-data", "rows"]),
        ("expected letters, digits and _ only", ["photos", "--to-data", "out", "--split", "../x"]),
        ("expected letters, digits and _ only", ["photos", "--to-data", "out", "--split", "a-b"]),
        ("expected letters, digits and _ only", ["photos", "--to-data", "out", "--split", "all"]),
        ("--split is empty; give a value", ["photos", "--to-data", "out", "--split", " "]),
    ],
)
def test_wrong_calls(photos, rows, segment, tmp_path, monkeypatch, words, arguments):
    monkeypatch.chdir(tmp_path)
    with rejected(words):
        segment(*arguments)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_ids_are_no_way_out_of_the_folder(segment, tmp_path):
    noise().save(tmp_path / "one.png")
    image = {"bytes": (tmp_path / "one.png").read_bytes()}
    features = Features({"image": Image(), "id": Value("string")})
    rows = {"image": [image, image, None], "id": ["../up", "/root", "none"]}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows" / "test.parquet")
    code, _, stderr = segment("--data", tmp_path / "rows", "--split", "test", "--out", tmp_path / "out")
    assert code == 1
    assert (stderr.count("no name for a file"), stderr.count("has no image")) == (2, 1)
    assert not list((tmp_path / "out").iterdir())


def test_two_rows_never_write_one_file(segment, tmp_path):
    noise().save(tmp_path / "one.png")
    features = Features({"image": Image(), "id": Value("string")})
    rows = {"image": [{"bytes": (tmp_path / "one.png").read_bytes()}] * 4, "id": ["a", "a", "b", "a_overlay"]}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows" / "test.parquet")
    call = ["--data", tmp_path / "rows", "--split", "test", "--out", tmp_path / "out", "--output", "mask", "overlay"]
    code, stdout, stderr = segment(*call)
    assert (code, "2 segmented" in stdout, "2 failed" in stdout) == (1, True, True)
    assert re.findall(r"failed: (\S+): an earlier row already gives", stderr) == ["a", "a_overlay"]
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"a", "a_overlay", "b", "b_overlay"}


def test_ids_that_are_numbers_stay(tmp_path):
    features = Features({"image": Image(), "id": Value("int64"), "source": Value("int64")})
    rows = {"image": [None, None], "id": [0, 1], "source": [0, None]}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows" / "test.parquet")
    (shard,) = shards_of_data(str(tmp_path / "rows"), "test")
    assert [(job.row["id"], job.row["source"]) for job in shard.jobs()] == [("0", "0"), ("1", "rows")]


@pytest.mark.slow
def test_mark_of_a_network_on_the_hub_names_its_weights(checkpoint, tmp_path):
    """Its weights can change under one id."""
    hub = HubServer()
    hub.start()
    code = """
import pathlib, sys
from huggingface_hub import HfApi
from unconceal.segmenting import describe_settings
folder, api = pathlib.Path(sys.argv[1]), HfApi()
api.create_repo("org/net")
for text in ("one", "two"):
    (folder / "note.txt").write_text(text)
    api.upload_folder(repo_id="org/net", folder_path=folder)
    print(describe_settings("org/net", None, refine="auto"))
print(describe_settings("org/net", "main", refine="auto"))
print(describe_settings("org/absent", None))
"""
    shutil.copytree(checkpoint, tmp_path / "net")
    command = [sys.executable, "-c", code, str(tmp_path / "net")]
    try:
        done = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
    finally:
        hub.stop()
    marks = done.stdout.splitlines()
    assert len(marks) == 4, done.stderr
    assert all(re.fullmatch(r"org/net \(commit [0-9a-f]{12}\), refine auto", mark) for mark in marks[:3]), marks
    assert marks[0] != marks[1] == marks[2] and marks[3] == "org/absent"


@pytest.mark.slow
def test_shards_go_to_the_hub_and_are_not_sent_again(checkpoint, rows, tmp_path):
    hub = HubServer()
    hub.start()
    command = [sys.executable, "-m", "unconceal", "segment", "--data", str(rows), "--split", "test"]
    command += ["--to-data", "org/masks", "--model", str(checkpoint), "--device", "cpu"]
    options = {"env": hub.environment(tmp_path / "home"), "cwd": tmp_path, "capture_output": True, "text": True}
    try:
        first, second, other = (subprocess.run(command + more, **options) for more in ([], [], ["--threshold", "0.4"]))
        files = hub.files("org/masks", "dataset")
        loaded = "from datasets import load_dataset; print(len(load_dataset('org/masks', split='test')))"
        reader = subprocess.run([sys.executable, "-c", loaded], **options)
    finally:
        hub.stop()
    assert (first.returncode, second.returncode) == (1, 0), first.stderr + second.stderr
    assert "9 images: 8 segmented into org/masks" in first.stdout
    assert "3 shards skipped" in second.stdout
    assert other.returncode == 2 and "other settings: " in other.stderr and "now " in other.stderr, other.stderr
    assert sum(name.startswith("data/test-") for name in files) == 3
    assert reader.stdout == "8\n", reader.stderr
