"""The server stands in for the Hub, so that it must satisfy the real clients, each in a process of its own."""

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import datasets
import hub_server
import numpy as np
import pytest
import torch
from common import FRESH_PROCESS, SMALLEST_SRS, modules_beyond_transformers
from hub_server import HubServer
from PIL import Image
from safetensors.torch import save_file

from unconceal import SrsConfig, SrsForImageSegmentation, UnconcealImageProcessor
from unconceal.evaluation.protocols import PROTOCOLS
from unconceal.hub.metric_space import write_metric_space


# Other hosts cannot be reached, and are named at the end: libraries swallow what goes wrong there.
GUARD = """
import sys


def guard(event, arguments):
    if event not in ("socket.connect", "socket.getaddrinfo"):
        return
    address = arguments[1] if event == "socket.connect" else arguments[0]
    host = address[0] if isinstance(address, tuple) else address
    if host != "127.0.0.1":
        sys.stderr.write(f"REACHED {host}\\n")
        raise OSError(f"this test has no way to {host}")


sys.addaudithook(guard)
"""
HELPERS = """
import json, os, pathlib, sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download

api = HfApi()
work = pathlib.Path(sys.argv[1])


def error(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as caught:
        return caught
    raise AssertionError("nothing was raised")


def status(*arguments, **options):
    return error(*arguments, **options).response.status_code
"""


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub", {"hf_test": "tester", "hf_stranger": "stranger"}) as server:
        yield server


def run_python(code: str, environment: dict[str, str], *arguments, succeeds: bool = True) -> str:
    """Run `code` in a fresh process that can reach nothing but this machine; return what it printed."""
    command = [sys.executable, "-c", GUARD + code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == succeeds, done.stderr
    # datasets puts this name before the endpoint's, and goes on when there is no such host.
    assert set(re.findall("REACHED (.*)", done.stderr)) <= {"datasets-server.127.0.0.1"}
    return done.stdout if succeeds else done.stderr


def call(hub, method: str, path: str, body=None, token: str | None = "hf_test", headers=None):
    """Send a request without a client; return status, headers and body."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(hub.url + path, data, headers or {}, method=method)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def commit(hub, *lines, path="/api/models/org/model/commit/main", **header):
    lines = [{"key": "header", "value": {"summary": "change", **header}}, *lines]
    return call(hub, "POST", path, b"\n".join(json.dumps(line).encode() for line in lines))


def added(path: str, content: bytes) -> dict:
    return {
        "key": "file",
        "value": {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"},
    }


def upload(hub, content: bytes, oid: str | None = None) -> int:
    """Announce and send a large file; return the status of the second."""
    oid = oid or hashlib.sha256(content).hexdigest()
    objects = {"operation": "upload", "objects": [{"oid": oid, "size": len(content)}]}
    _, _, answer = call(hub, "POST", "/org/model.git/info/lfs/objects/batch", objects)
    href = json.loads(answer)["objects"][0]["actions"]["upload"]["href"]
    return call(hub, "PUT", href.removeprefix(hub.url), content, token=None)[0]


# ---- huggingface_hub ------------------------------------------------------------------------------------------------


def test_repositories_of_the_hub_client(hub, tmp_path):
    run_python(
        HELPERS
        + """
assert api.whoami()["name"] == "tester"
assert [one["name"] for one in api.whoami()["orgs"]] == ["org"]
assert "Invalid user token" in str(error(api.whoami, token="hf_wrong"))
url = api.create_repo("org/model", private=True)
assert (url.repo_id, url.repo_type) == ("org/model", "model")
assert api.create_repo("org/model", exist_ok=True) == url
assert api.create_repo("alone").repo_id == "tester/alone"
assert status(api.create_repo, "org/model") == 409
assert status(api.create_repo, "other/model") == 403
assert "under the namespace" in str(error(api.create_repo, "other/model"))
assert status(api.create_repo, "org/second", token=False) == 401

api.update_repo_settings("tester/alone", private=True)
assert api.repo_info("tester/alone").private
for token in (False, "hf_stranger"):
    for missing in (
        error(api.repo_info, "tester/alone", token=token),
        error(hf_hub_download, "tester/alone", ".gitattributes", token=token),
    ):
        assert type(missing).__name__ == "RepositoryNotFoundError", missing
api.update_repo_settings("tester/alone", private=False)
assert open(hf_hub_download("tester/alone", ".gitattributes", token=False)).read()
for token, code in ((False, 401), ("hf_stranger", 403)):
    file = {"path_or_fileobj": b"x", "path_in_repo": "x"}
    assert status(api.upload_file, **file, repo_id="tester/alone", token=token) == code

api.create_repo("org/space", repo_type="space", space_sdk="gradio")
assert api.space_info("org/space").sdk == "gradio"
assert api.list_repo_files("org/space", repo_type="space") == [".gitattributes", "README.md"]
assert status(api.repo_info, "org/space") == 404
api.delete_repo("org/space", repo_type="space")
assert status(api.delete_repo, "org/space", repo_type="space") == 404
api.delete_repo("org/space", repo_type="space", missing_ok=True)
""",
        hub.environment(tmp_path / "home"),
        tmp_path,
    )


def test_commits_of_the_hub_client(tmp_path):
    weights = np.random.default_rng(0).bytes(250_000)
    folder = tmp_path / "folder"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "sub" / "deep" / "näme 1.txt").write_text("text")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    (folder / "empty.bin").touch()
    with HubServer(tmp_path / "hub") as hub:
        hub.part_size = 100_000
        printed = run_python(
            HELPERS
            + """
api.create_repo("org/model")
first = api.upload_folder(repo_id="org/model", folder_path=work / "folder", commit_message="first").oid
assert api.upload_folder(repo_id="org/model", folder_path=work / "folder").oid == first, "nothing had changed"
api.create_tag("org/model", tag="v1")
assert status(api.create_tag, "org/model", tag="v1") == 409
api.create_branch("org/model", branch="try/this")
other = api.upload_file(repo_id="org/model", path_or_fileobj=b"b", path_in_repo="sub/b.txt", revision="try/this").oid
second = api.create_commit(
    "org/model",
    [CommitOperationDelete("sub/"), CommitOperationAdd("a.txt", b"a")],
    commit_message="second",
    parent_commit=first,
).oid

refs = api.list_repo_refs("org/model")
assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "try/this": other}
assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
everything = {".gitattributes", "README.md", "model.safetensors", "empty.bin", "sub/deep/näme 1.txt"}
assert set(api.list_repo_files("org/model", revision="v1")) == everything
assert set(api.list_repo_files("org/model", revision="try/this")) == everything | {"sub/b.txt"}
assert set(api.list_repo_files("org/model")) == everything - {"sub/deep/näme 1.txt"} | {"a.txt"}
assert [one.title for one in api.list_repo_commits("org/model")] == ["second", "first", "initial commit"]
top = {entry.path: type(entry).__name__ for entry in api.list_repo_tree("org/model", revision="v1")}
assert top["sub"] == "RepoFolder" and "sub/deep" not in top
weights, folder = api.get_paths_info("org/model", ["model.safetensors", "sub/deep", "missing"], revision=first)
assert (weights.size, weights.lfs.size, folder.path) == (250_000, 250_000, "sub/deep")
assert type(error(api.list_repo_tree("org/model", "missing").__next__)).__name__ == "RemoteEntryNotFoundError"
sizes = {one.rfilename: one.size for one in api.repo_info("org/model", files_metadata=True).siblings}
assert (sizes["model.safetensors"], sizes["empty.bin"]) == (250_000, 0)

for revision in ("v1", first, first[:8], "try/this"):
    opened = pathlib.Path(snapshot_download("org/model", revision=revision))
    assert (opened / "sub/deep/näme 1.txt").read_text() == "text"
assert type(error(hf_hub_download, "org/model", "a.txt", revision="v2")).__name__ == "RevisionNotFoundError"
assert type(error(hf_hub_download, "org/model", "b.txt")).__name__ == "RemoteEntryNotFoundError"
assert type(error(hf_hub_download, "org/other", "a.txt")).__name__ == "RepositoryNotFoundError"

late = error(api.upload_file, repo_id="org/model", path_or_fileobj=b"c", path_in_repo="c", parent_commit=first)
assert late.response.status_code == 412
gone = error(api.create_commit, "org/model", [CommitOperationDelete("missing")], commit_message="third")
assert type(gone).__name__ == "RemoteEntryNotFoundError"
broken = b"---\\nlicense: mit\\n"
assert "no closing" in str(error(api.upload_file, repo_id="org/model", path_or_fileobj=broken, path_in_repo="README.md"))
assert api.repo_info("org/model").sha == second
api.delete_tag("org/model", tag="v1")
api.delete_branch("org/model", branch="try/this")
assert [ref.name for ref in api.list_repo_refs("org/model").branches] == ["main"]
assert status(api.delete_branch, "org/model", branch="main") == 403
print(first)
""",
            hub.environment(tmp_path / "home"),
            tmp_path,
        )
        first, oid = printed.strip(), hashlib.sha256(weights).hexdigest()
        assert hub.files("org/model", revision=first)["model.safetensors"] == weights
        assert hub.files("org/model")["a.txt"] == b"a"
        sent = [line for line in hub.requests if line.startswith("PUT")]
        assert sorted(sent) == [f"PUT /lfs/model/org/model/{oid}/{part}" for part in (1, 2, 3)], "once, in parts"


def test_downloads_are_cached_and_resumed(hub, tmp_path):
    run_python(
        HELPERS
        + """
api.create_repo("org/model")
api.upload_file(repo_id="org/model", path_or_fileobj=os.urandom(100_000), path_in_repo="weights.bin")
""",
        hub.environment(tmp_path / "home"),
        tmp_path,
    )
    content = hub.files("org/model")["weights.bin"]
    load = HELPERS + 'print(hf_hub_download("org/model", "weights.bin"))'
    for home, expected in (("one", ["HEAD", "GET"]), ("one", ["HEAD"]), ("two", ["HEAD", "GET"])):
        hub.requests.clear()
        path = run_python(load, hub.environment(tmp_path / home), tmp_path).strip()
        assert [line.split()[0] for line in hub.requests if "weights.bin" in line] == expected
        assert Path(path).read_bytes() == content

    url, size = "/org/model/resolve/main/weights.bin", len(content)
    for asked, part in (
        ("0-9", content[:10]),
        ("99990-", content[-10:]),
        ("-5", content[-5:]),
        ("5-999999", content[5:]),
    ):
        status, headers, body = call(hub, "GET", url, headers={"Range": f"bytes={asked}"})
        assert (status, body) == (206, part)
        start = size - 5 if asked == "-5" else int(asked.split("-")[0])
        assert headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/{size}"
    status, headers, _ = call(hub, "GET", url, headers={"Range": "bytes=100000-"})
    assert (status, headers["Content-Range"]) == (416, "bytes */100000")
    status, headers, body = call(hub, "HEAD", url)
    assert (status, body, headers["Content-Length"], headers["X-Linked-Size"]) == (200, b"", "100000", "100000")
    assert headers["ETag"] == headers["X-Linked-ETag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    assert re.fullmatch("[0-9a-f]{40}", headers["X-Repo-Commit"])


def test_no_part_of_a_refused_commit_stays(hub):
    assert call(hub, "POST", "/api/repos/create", {"name": "model", "organization": "org"})[0] == 200
    before = hub.files("org/model")
    content = b"large" * 1000
    oid = hashlib.sha256(content).hexdigest()
    pointer = {"key": "lfsFile", "value": {"path": "model.onnx", "algo": "sha256", "oid": oid, "size": len(content)}}
    good = added("good.txt", b"good")

    status, _, body = commit(hub, good, pointer)
    assert (status, b"LFS pointer pointed to a file that does not exist" in body) == (400, True)
    assert upload(hub, b"other", oid) == 400
    assert commit(hub, good, pointer)[0] == 400
    assert upload(hub, content) == 200
    broken = {"key": "file", "value": {"path": "a", "content": "no base64", "encoding": "base64"}}
    for bad in (
        broken,
        added("../a", b""),
        added("a/.git/b", b""),
        {"key": "unknown", "value": {"path": "a"}},
        {},
        [],
    ):
        assert commit(hub, good, pointer, bad)[0] == 400, bad
    assert commit(hub, good, {"key": "deletedFile", "value": {"path": "missing"}})[0] == 404
    assert commit(hub, good, parentCommit="0" * 40)[0] == 412
    assert commit(hub, good, summary="")[0] == 400
    assert commit(hub, good, path="/api/models/org/model/commit/v1")[0] == 404
    assert call(hub, "POST", "/api/models/org/model/commit/main", b'{"key": "header", "val')[0] == 400
    assert hub.files("org/model") == before

    objects = {"operation": "upload", "objects": [{"oid": oid, "size": len(content)}]}
    _, _, body = call(hub, "POST", "/org/model.git/info/lfs/objects/batch", objects)
    assert "actions" not in json.loads(body)["objects"][0], "uploaded already"
    assert commit(hub, good, pointer)[0] == 200
    assert hub.files("org/model") == {**before, "good.txt": b"good", "model.onnx": content}


@pytest.mark.parametrize("name", ["a--b", "a..b", "-a", "a-", ".a", "a.git", "a b", "ü", "a" * 97, ""])
def test_names_that_the_hub_refuses(name, hub):
    status, headers, body = call(hub, "POST", "/api/repos/create", {"name": name, "organization": "org"})
    assert status == 400
    assert "Only regular characters and '-', '_', '.' are accepted" in json.loads(body)["error"]
    assert headers["X-Error-Message"] == json.loads(body)["error"]


def test_a_call_that_is_not_answered_is_no_missing_repository(hub):
    status, headers, _ = call(hub, "GET", "/api/collections")
    assert (status, headers["X-Error-Code"]) == (404, None)
    assert call(hub, "GET", "/api/models/org/model", token="hf_wrong")[1]["X-Error-Code"] is None
    assert hub.requests == ["GET /api/collections", "GET /api/models/org/model"]


# ---- a server that dies ---------------------------------------------------------------------------------------------


def test_a_push_goes_on_where_the_server_died(hub, tmp_path):
    contents = {"a.safetensors": 200_000, "b.safetensors": 2_000_000, "notes.txt": 500_000}
    (tmp_path / "folder").mkdir()
    for name, size in contents.items():
        contents[name] = np.random.default_rng(size).bytes(size)
        (tmp_path / "folder" / name).write_bytes(contents[name])
    environment = hub.environment(tmp_path / "home")
    # The client tries again for half a minute; here without the pauses between.
    push = (
        HELPERS
        + """
import time

time.sleep = lambda seconds: None
api.create_repo("org/model", exist_ok=True)
additions = [CommitOperationAdd(path.name, path) for path in sorted((work / "folder").iterdir())]
print(api.create_commit("org/model", additions, commit_message="all", num_threads=1).oid)
"""
    )

    def sent() -> list[str]:
        oids = {hashlib.sha256(content).hexdigest(): name for name, content in contents.items()}
        return [oids[line.rpartition("/")[2]] for line in hub.requests if line.startswith("PUT")]

    hub.fail_after(1_000_000)
    assert "Error while uploading 'b.safetensors' to the Hub" in run_python(
        push, environment, tmp_path, succeeds=False
    )
    with pytest.raises(urllib.error.URLError):
        call(hub, "GET", "/api/whoami-v2")
    assert hub.files("org/model").keys() == {".gitattributes"}
    assert sent() == ["a.safetensors", "b.safetensors"]

    hub.start()
    hub.fail_after(2_100_000)  # in the commit, which holds the text
    run_python(push, environment, tmp_path, succeeds=False)
    assert hub.requests[-1] == "POST /api/models/org/model/commit/main"
    assert hub.files("org/model").keys() == {".gitattributes"}
    assert sent() == ["a.safetensors", "b.safetensors", "b.safetensors"]

    hub.start()
    oid = run_python(push, environment, tmp_path).strip()
    assert sent() == ["a.safetensors", "b.safetensors", "b.safetensors"], "nothing is sent twice"
    files = hub.files("org/model", revision=oid)
    assert {name: files[name] for name in contents} == contents


def test_state_survives_a_restart(hub):
    assert call(hub, "POST", "/api/repos/create", {"name": "model"})[0] == 200
    url = hub.url
    hub.stop()
    hub.stop()
    hub.start()
    assert hub.url == url
    assert call(hub, "GET", "/api/models/tester/model")[0] == 200


def test_environment_of_a_client(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("HF_DATASETS_CACHE", "/elsewhere")
    monkeypatch.setenv("no_proxy", "example.org")
    environment = hub.environment(tmp_path, token=None)
    assert "HF_TOKEN" not in environment
    assert "HF_DATASETS_CACHE" not in environment
    assert (environment["HF_HUB_OFFLINE"], environment["no_proxy"]) == ("0", "example.org,127.0.0.1")
    assert hub.environment(tmp_path)["HF_TOKEN"] == "hf_test"
    assert os.environ["HF_HUB_OFFLINE"] == "1", "other tests stay offline"


def test_served_by_hand_with_the_standard_library_alone(tmp_path):
    command = [sys.executable, "-S", hub_server.__file__, str(tmp_path / "hub")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        request = urllib.request.Request(f"{url}/api/whoami-v2", headers={"Authorization": "Bearer hf_test"})
        with urllib.request.urlopen(request) as response:
            assert json.load(response)["name"] == "tester"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


# ---- libraries that build on it -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_opens_by_its_id(hub, tmp_path):
    torch.manual_seed(0)
    earlier, model = (SrsForImageSegmentation(SrsConfig(**SMALLEST_SRS)).eval() for _ in range(2))
    tensors = {"pixel_values": torch.randn(1, model.config.num_channels, 64, 64)}
    for key, one in (("earlier", earlier), ("prediction", model)):
        one.save_pretrained(tmp_path / key)
        UnconcealImageProcessor().save_pretrained(tmp_path / key)
        with torch.no_grad():
            tensors[key] = one(tensors["pixel_values"]).logits
    assert not torch.equal(tensors["earlier"], tensors["prediction"])
    save_file(tensors, tmp_path / "tensors.safetensors")
    push = """
api.create_repo("org/srs-tiny", private=True)
print(api.upload_folder(repo_id="org/srs-tiny", folder_path=work / "earlier").oid)
api.create_tag("org/srs-tiny", tag="v1")
api.upload_folder(repo_id="org/srs-tiny", folder_path=work / "prediction")
"""
    first = run_python(HELPERS + push, hub.environment(tmp_path / "home"), tmp_path).strip()
    hub.requests.clear()
    task = {
        "hidden": modules_beyond_transformers(),
        "num_threads": torch.get_num_threads(),
        "tensors": str(tmp_path / "tensors.safetensors"),
        "folder": "org/srs-tiny",
        "again": str(tmp_path / "again"),
        "model_class": "SrsForImageSegmentation",
        "main_output": "logits",
        "auto_classes": SrsForImageSegmentation.auto_classes,
        "first": first,
        "empty": str(tmp_path / "empty"),
    }
    more = """
auto = transformers.AutoModelForImageSegmentation
for revision in ("v1", task["first"]):
    model = auto.from_pretrained(task["folder"], revision=revision, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(model(tensors["pixel_values"]).logits, tensors["earlier"]), revision
processor = transformers.AutoImageProcessor.from_pretrained(task["folder"], trust_remote_code=True)
assert type(processor).__name__ == "UnconcealImageProcessor"
for name, token in (("org/none", None), ("none", None), ("org/srs-tiny", False)):
    try:
        auto.from_pretrained(name, token=token, trust_remote_code=True, cache_dir=task["empty"])
    except OSError as error:
        assert "is not a valid model identifier" in str(error), error
    else:
        raise AssertionError(name)
"""
    run_python(FRESH_PROCESS + more, hub.environment(tmp_path / "home"), json.dumps(task))
    fetched = [line for line in hub.requests if line.startswith("GET ") and line.endswith("/model.safetensors")]
    assert len(fetched) == 2, "once for each revision, however often it is opened"


@pytest.mark.slow
def test_a_data_set_opens_downloaded_and_streaming(hub, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 20, 30, 3), dtype=np.uint8)
    masks = 255 * rng.integers(0, 2, (8, 20, 30), dtype=np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(mode="L"), "id": datasets.Value("string")}
    )
    (tmp_path / "folder" / "data").mkdir(parents=True)
    for split, indices in (("train", range(5)), ("val", range(5, 8))):
        rows = [
            {"image": Image.fromarray(images[i]), "mask": Image.fromarray(masks[i]), "id": str(i)} for i in indices
        ]
        path = tmp_path / "folder" / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    np.savez(tmp_path / "arrays.npz", images=images, masks=masks)
    run_python(
        HELPERS
        + """
import datasets
import numpy as np

arrays = np.load(work / "arrays.npz")
indices = {"train": range(5), "val": range(5, 8)}


def check(data):
    assert set(data) == set(indices)
    for split in indices:
        rows = list(data[split])
        assert [row["id"] for row in rows] == [str(i) for i in indices[split]]
        for row in rows:
            assert (row["image"].mode, row["mask"].mode) == ("RGB", "L")
            assert np.array_equal(row["image"], arrays["images"][int(row["id"])])
            assert np.array_equal(row["mask"], arrays["masks"][int(row["id"])])


api.create_repo("org/cod-tiny", repo_type="dataset", private=True)
api.upload_folder(repo_id="org/cod-tiny", folder_path=work / "folder", repo_type="dataset")
missing = error(datasets.load_dataset, "org/cod-tiny", token=False)
assert type(missing).__name__ == "DatasetNotFoundError", missing
downloaded = datasets.load_dataset("org/cod-tiny")
check(downloaded)
check(datasets.load_dataset("org/cod-tiny", streaming=True))

downloaded.push_to_hub("org/pushed", private=True)
check(datasets.load_dataset("org/pushed"))
second = api.repo_info("org/pushed", repo_type="dataset").sha
downloaded["val"].push_to_hub("org/pushed", split="test")
assert set(datasets.load_dataset("org/pushed", streaming=True)) == {"train", "val", "test"}
check(datasets.load_dataset("org/pushed", streaming=True, revision=second))
""",
        hub.environment(tmp_path / "home"),
        tmp_path,
    )
    assert hub.files("org/pushed", "dataset").keys() == {
        ".gitattributes",
        "README.md",
        "data/train-00000-of-00001.parquet",
        "data/val-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    }


@pytest.mark.slow
def test_a_metric_opens_from_its_space(hub, tmp_path):
    rng = np.random.default_rng(0)
    targets = rng.random((3, 24, 30)) < 0.3
    probs = np.clip(0.5 * targets + 0.6 * rng.random(targets.shape), 0, 1).astype(np.float32)
    np.savez(tmp_path / "arrays.npz", probs=probs, targets=targets)
    write_metric_space("cod", tmp_path / "unconceal-cod")
    printed = run_python(
        HELPERS
        + """
import evaluate
import numpy as np

api.create_repo("org/unconceal-cod", repo_type="space", space_sdk="gradio", private=True)
api.upload_folder(repo_id="org/unconceal-cod", folder_path=work / "unconceal-cod", repo_type="space")
metric = evaluate.load("org/unconceal-cod")
assert type(error(evaluate.load, "org/unconceal-none")).__name__ == "FileNotFoundError"
arrays = np.load(work / "arrays.npz")
print(json.dumps(metric.compute(predictions=list(arrays["probs"]), references=list(arrays["targets"]))))
""",
        hub.environment(tmp_path / "home"),
        tmp_path,
    )
    protocol = PROTOCOLS["cod"]
    options = protocol.options(**protocol.report_options)
    scores = (protocol.score_image(*pair, **options) for pair in zip(probs, targets, strict=True))
    assert json.loads(printed) == protocol.summarize(scores)
