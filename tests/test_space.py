"""The web demo as programs use it: a server in its own process, asked over HTTP."""

import ast
import asyncio
import contextlib
import csv
import gzip
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from save_tiny_models import save_tiny_models
from skimage import measure

from unconceal.api import cutout, load
from unconceal.data.synthetic import generate
from unconceal.hub.stage import stage_space
from unconceal.models.cutout import mask_to_image


gradio_client = pytest.importorskip("gradio_client", reason="the demo needs the extra `space`")
pytest.importorskip("gradio", reason="the demo needs the extra `space`")

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "space"
NETWORKS = {"camouflaged": "run", "lesion": "srs", "cut-out": "opds"}
META = {"meta": {"_type": "gradio.FileData"}}
PATIENCE = 500  # seconds; only a hang takes this long
# Stands in for the package of a ZeroGPU Space, which pickles arguments and results.
LENDER = """
import pickle

def GPU(duration):
    def lend(function):
        def lent(*given):
            print("lent", duration)
            return pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(given)))))
        return lent
    return lend
"""


@dataclass
class Server:
    """A running demo.

    Attributes:
        url: Its address.
        process: Its process.
        folder: Its folder for temporary files.
    """

    url: str
    process: subprocess.Popen
    folder: Path

    def client(self):
        downloads = self.folder.parent / "downloads"
        return gradio_client.Client(
            self.url, verbose=False, download_files=downloads, httpx_kwargs={"timeout": PATIENCE}
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE)

    def post(self, path: str, **content) -> httpx.Response:
        return httpx.post(f"{self.url}/gradio_api{path}", timeout=PATIENCE, **content)

    def upload(self, name: str, content: bytes) -> str:
        (path,) = self.post("/upload", files={"files": (name, content)}).json()
        return path

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]


@contextmanager
def serve(models: dict[str, Path], folder: Path, *options: str, **variables: str):
    """Run the demo with temporary files in `folder` / "temporary"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "temporary").mkdir(parents=True)
    pairs = [f"{name}={path}" for name, path in models.items()]
    command = [sys.executable, str(SPACE / "app.py"), "--port", str(port), *options, "--model", *pairs]
    environment = {**os.environ, "TMPDIR": str(folder / "temporary"), "HF_HOME": str(folder / "hub"), **variables}
    log = folder / "log"
    server = None
    with log.open("w") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
    try:
        started = time.monotonic()
        while server is None and process.poll() is None and time.monotonic() < started + PATIENCE:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}", timeout=30).raise_for_status()
                server = Server(f"http://127.0.0.1:{port}", process, folder / "temporary")
            time.sleep(0.1)
        assert server, log.read_text()
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))[0].parent


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    """A demo with a lent GPU and one broken network."""
    folder = tmp_path_factory.mktemp("server")
    for name, file, text in (("broken", "config.json", "{}"), ("lent", "spaces.py", LENDER)):
        (folder / name).mkdir()
        (folder / name / file).write_text(text)
    named = {name: models / kind for name, kind in NETWORKS.items()}
    variables = {"PYTHONPATH": str(folder / "lent"), "PYTHONUNBUFFERED": "1"}
    with serve({**named, "broken": folder / "broken"}, folder, **variables) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A JPEG larger than the input of the networks, rotated by its EXIF orientation."""
    noise = np.random.default_rng(1).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path_factory.mktemp("photo") / "photo of a hill.jpg"
    Image.fromarray(noise).resize((150, 200), Image.Resampling.BICUBIC).save(path, exif=exif)
    return path


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def ask(client, path, network="camouflaged", api_name="/segment", **options):
    return client.predict(gradio_client.handle_file(path), network, **options, api_name=api_name)


def refused(match: str):
    return pytest.raises(gradio_client.exceptions.AppError, match=match)


# Answers.


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_answers_equal_the_library(client, models, photo, network):
    segmenter, image = load(models / NETWORKS[network], device="cpu"), Image.open(photo)
    (fine,), (coarse,) = (segmenter.segment([image], refine=refine) for refine in ("auto", "never"))
    assert not np.array_equal(mask_to_image(fine), mask_to_image(coarse))

    path, report = ask(client, photo, network)
    np.testing.assert_array_equal(pixels(path), mask_to_image(fine))
    assert Path(path).name == "photo of a hill_mask.png"
    np.testing.assert_array_equal(pixels(ask(client, photo, network, fine_edges=False)[0]), mask_to_image(coarse))
    np.testing.assert_array_equal(pixels(ask(client, photo, network, "/cutout")), cutout(image, fine))

    parts = sorted(measure.regionprops(measure.label(fine > 0.5)), key=lambda part: -part.area)
    assert [box["area"] for box in report["boxes"]] == [part.area for part in parts][:50]
    top, left, bottom, right = parts[0].bbox
    largest = {"x": left, "y": top, "width": right - left, "height": bottom - top, "area": parts[0].area}
    assert report.pop("boxes")[0] == largest
    assert report.pop("seconds") > 0
    assert report.pop("share") == pytest.approx((fine > 0.5).mean())
    kind = NETWORKS[network].upper()
    assert report == {"network": network, "model": kind, "device": "cpu", "width": 200, "height": 150}


def test_stages_equal_the_library(client, models, photo):
    unfolding = load(models / "run", device="cpu").unfold(Image.open(photo), (200, 150))
    expected = {
        f"{k} {kind}": image for k, stage in enumerate(unfolding.stages) for kind, image in stage.images().items()
    }
    shown = {one["caption"]: one["image"] for one in ask(client, photo, api_name="/unfold")}
    assert shown.keys() == expected.keys()
    assert len(shown) == 4 * len(unfolding.stages) - 1  # the coarse start has no edge
    for caption, path in shown.items():
        np.testing.assert_array_equal(np.asarray(Image.open(path).convert("RGB")), expected[caption].convert("RGB"))


def test_a_network_without_stages_says_so(client, photo):
    with refused("in one step. Only RUN has stages"):
        ask(client, photo, "lesion", "/unfold")


@pytest.mark.slow
def test_batch(client, server, models, photo, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not an image")
    turned = tmp_path / "=turned.jpg"  # its orientation is unreadable, so it stays as stored
    Image.open(photo).save(turned, exif=b"Exif\0\0no header of a TIFF")
    other = tmp_path / "photo of a hill.png"  # same stem as the first, other format
    Image.open(SPACE / "examples" / "infrared-1.png").resize((70, 50)).save(other)
    files = [gradio_client.handle_file(path) for path in (photo, text, turned, other)]
    archive, report = client.predict(files, "lesion", ["mask", "cutout", "mask"], api_name="/segment_batch")

    rows = report["data"]
    unreadable = "This file is not an image we can read. Use JPEG, PNG, WebP, TIFF or another format."
    assert [row[:4] for row in rows] == [
        [photo.name, "done", 200, 150],
        ["text.png", unreadable, None, None],
        ["'=turned.jpg", "done", 150, 200],
        [other.name, "done", 70, 50],
    ]
    masks = load(models / "srs", device="cpu").segment([Image.open(path) for path in (photo, turned, other)])
    with zipfile.ZipFile(archive) as results:
        stems = ("photo of a hill", "=turned", "photo of a hill-2")
        names = [f"{stem}_{kind}.png" for stem in stems for kind in ("mask", "cutout")]
        assert results.namelist() == [*names, "report.csv"]
        for stem, mask in zip(stems, masks, strict=True):
            np.testing.assert_array_equal(pixels(io.BytesIO(results.read(f"{stem}_mask.png"))), mask_to_image(mask))
        written = list(csv.reader(io.StringIO(results.read("report.csv").decode())))
    assert written[0] == report["headers"]
    assert [row[:2] for row in written[1:]] == [row[:2] for row in rows]
    (uploads,) = server.folder.glob("unconceal-space-*")
    assert all(path.is_relative_to(uploads) for path in server.files()), "a result outside the folder that is swept"

    for wrong, words in (([], "Add images first"), (files * 13, "Got 52 images")):
        with refused(words):
            client.predict(wrong, "lesion", api_name="/segment_batch")


def test_documented_api_works_and_is_complete(server, client, photo, tmp_path):
    page = (SPACE / "page" / "program.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for name, used in (("OWNER/SPACE", server.url), ("photo.jpg", photo)):
        assert name in snippet
        snippet = snippet.replace(name, str(used))
    command = [sys.executable, "-c", snippet]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    path, boxes = result.stdout.splitlines()[-1].split(".png ", 1)
    assert pixels(f"{path}.png").shape == (150, 200)
    assert ast.literal_eval(boxes)[0]["area"] > 0
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == set(re.findall(r"`(/\w+)`", page))
    for name, endpoint in endpoints.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"- `{name}`"))
        assert all(f"`{parameter['parameter_name']}`" in line for parameter in endpoint["parameters"])


@pytest.mark.parametrize("suffix", ["avif", "bmp", "gif", "jp2", "jpg", "png", "ppm", "tga", "tif", "webp"])
def test_formats(client, models, tmp_path, suffix):
    check_mask(client, models, tmp_path / f"a.{suffix}", noise().convert("RGB"))


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "P", "CMYK"])
def test_color_modes(client, models, tmp_path, mode):
    image = Image.fromarray(np.asarray(noise(), np.uint16) * 257) if mode == "I;16" else noise().convert(mode)
    check_mask(client, models, tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), image)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 50), dtype=np.uint8))


def check_mask(client, models, path, image):
    image.save(path)
    (mask,) = load(models / "srs", device="cpu").segment([Image.open(path)])
    np.testing.assert_array_equal(pixels(ask(client, path, "lesion")[0]), mask_to_image(mask))


# Guards.


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size but holds only a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
HTML = b"<html><script>alert(1)</script></html>"
TOO_LARGE, NO_IMAGE = "more than 50 megapixels", "not an image we can read"
HOSTILE = {
    "bomb.png": (png_header(65_535, 65_535), TOO_LARGE),
    "200-megapixels.png": (png_header(20_000, 10_000), TOO_LARGE),
    "just-too-large.png": (png_header(50_000_001, 1), TOO_LARGE),
    "cut-short.png": (png_header(60, 60), "damaged"),
    "image.svg": (SVG, NO_IMAGE),
    "svg.png": (SVG, NO_IMAGE),
    "page.html": (HTML, NO_IMAGE),
    "empty.png": (b"", NO_IMAGE),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", NO_IMAGE),
    "archive.png": (b"PK\x03\x04" + b"\0" * 60, NO_IMAGE),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(client, tmp_path, name):
    content, words = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(content)
    for api_name in ("/segment", "/cutout", "/unfold"):
        with refused(words):
            ask(client, path, api_name=api_name)
    _, report = client.predict([gradio_client.handle_file(path)], "lesion", api_name="/segment_batch")
    assert words in report["data"][0][1]


@contextmanager
def web(handler):
    """Run a web server on this machine and yield its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as inner:
        threading.Thread(target=inner.serve_forever, daemon=True).start()
        try:
            yield inner.server_port
        finally:
            inner.shutdown()


def test_private_addresses_are_not_fetched(client, server, photo):
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    name = photo.name.replace(" ", "%20")
    with web(partial(Handler, directory=photo.parent)) as port:
        for host in ("127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1"):
            address = {"path": f"http://{host}:{port}/{name}", **META}
            with refused(r"not on the open internet|no such address"):
                client.predict(address, "lesion", api_name="/segment")
            with refused("A batch accepts files only"):
                client.predict([address], "lesion", api_name="/segment_batch")
            assert server.get(f"/gradio_api/file=http://{host}:{port}/{name}").status_code == 403
    for address in ("http://169.254.169.254/latest/meta-data", "http://10.0.0.1/a.png", "http://100.64.0.1/a.png"):
        with refused("not on the open internet"):
            client.predict({"path": address, **META}, "lesion", api_name="/segment")
    assert requests == []


def outcome(server, given: dict) -> str:
    """Send a request that no client would send and return "complete" or "error"."""
    started = server.post("/call/segment", json={"data": [given, "lesion", True]})
    if started.status_code >= 400:
        return "error"
    return re.match(r"event: (\w+)", server.get(f"/gradio_api/call/segment/{started.json()['event_id']}").text)[1]


def test_other_files_of_the_machine_are_not_read(server, photo, tmp_path):
    outside = tmp_path / "image.png"  # a valid image, so only its place can be the reason
    Image.open(photo).save(outside)
    uploaded = server.upload("a.png", outside.read_bytes())
    assert outcome(server, {"path": uploaded, **META}) == "complete"
    climbing = f"{Path(uploaded).parent}/../../../../{outside.relative_to(server.folder.parents[1])}"
    assert Path(climbing).samefile(outside)

    folder, example = Path(uploaded).parents[1], SPACE / "examples" / "camouflage-1.jpg"
    for path in (folder, outside, climbing, f"file://{outside}", example, "examples/camouflage-1.jpg", "/etc/passwd"):
        for extra in (META, {}, {"url": f"{server.url}/gradio_api/file={uploaded}", **META}):
            assert outcome(server, {"path": str(path), **extra}) == "error", (path, extra)
    assert outcome(server, {"url": "data:image/png;base64,iVBORw0KGgo=", "path": None, **META}) == "error"
    log = server.folder.parent / "log"
    for path in (outside, climbing, "/etc/passwd", "file:///etc/passwd", SPACE / "app.py", log):
        assert server.get(f"/gradio_api/file={path}").status_code >= 400, path
    for path in ("/../../etc/passwd", "/static/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/app.py"):
        text = server.get(path).text
        assert "root:" not in text
        assert "def main" not in text


@pytest.mark.parametrize(("name", "content"), [("page.html", HTML), ("image.svg", SVG)])
def test_an_uploaded_page_is_only_a_download(server, name, content):
    response = server.get(f"/gradio_api/file={server.upload(name, content)}")
    assert response.headers["content-disposition"].startswith("attachment")
    assert response.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(
    "route",
    [
        "file=https://example.com/a.png",
        "file=HTTP://example.com",
        "proxy=https://a.hf.space/",
        "deep_link?session_hash=a",
    ],
)
def test_routes_that_the_demo_does_not_need_are_closed(server, route):
    assert server.get(f"/gradio_api/{route}").status_code == 403


def test_no_request_skips_the_queue(server):
    for name in ("segment", "cutout", "unfold", "segment_batch"):
        for route in (f"/api/{name}", f"/run/{name}"):
            response = server.post(route, json={"data": [None, "lesion", True]})
            assert response.status_code >= 400
            assert "queue" in response.text


def in_parts(size: int):
    """Yield a body that does not state its length."""
    for _ in range(size // 2**16):
        yield bytes(2**16)


@pytest.mark.parametrize("content", [bytes(2 * 2**20), in_parts(2 * 2**20)], ids=["stated", "in parts"])
def test_a_message_that_is_too_large_is_refused(server, content):
    with contextlib.suppress(httpx.TransportError):  # or the connection is closed
        assert server.post("/queue/join", content=content).status_code >= 400
    assert server.get("").status_code == 200


def test_a_file_that_is_too_large_is_refused(server):
    class Zeros(io.RawIOBase):
        left = 129 * 2**20

        def read(self, size=-1):
            size = min(self.left, 2**20)
            self.left -= size
            return bytes(size)

    assert server.post("/upload", files={"files": ("a.png", Zeros())}).status_code == 413


@pytest.mark.slow
def test_many_clients_at_once_get_their_own_answers(server, models, tmp_path):
    draw = np.random.default_rng(3)
    segmenter = load(models / "srs", device="cpu")

    def one_client(number: int):
        client = server.client()
        for image, mask in cases[number::10]:
            path, report = ask(client, image, "lesion")
            np.testing.assert_array_equal(pixels(path), mask)
            assert report["width"] == mask.shape[1]

    cases = []
    for index in range(30):
        image = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        image = image.resize((60 + index, 90), Image.Resampling.BICUBIC)  # all of different size
        image.save(tmp_path / f"{index}.png")
        cases.append((tmp_path / f"{index}.png", np.asarray(mask_to_image(segmenter.segment([image])[0]))))
    with ThreadPoolExecutor(10) as clients:
        list(clients.map(one_client, range(10)))


@pytest.mark.slow
def test_uploads_are_deleted_after_a_while_and_at_the_end(models, tmp_path):
    with serve({"lesion": models / "srs"}, tmp_path, "--kept", "5") as server:
        (uploads,) = server.folder.glob("unconceal-space-*")
        gone = server.upload("a.png", bytes(1000))
        # gradio has no record of a part with another name, nor of an interrupted upload.
        server.post("/upload", files={"other": ("a.png", bytes(1000))})
        with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as broken:
            broken.sendall(
                b"POST /gradio_api/upload HTTP/1.1\r\nHost: a\r\nContent-Length: 3000000\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
                b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(10**6)
            )
            seen = False
            started = time.monotonic()
            while not (seen and not list(uploads.iterdir())) and time.monotonic() < started + PATIENCE:
                seen = seen or any(path.stat().st_size > 1000 for path in server.files())
                time.sleep(0.05)
        assert seen, "the interrupted upload left no file"
        assert list(uploads.iterdir()) == []
        assert outcome(server, {"path": gone, **META}) == "error"
    assert not uploads.exists()


def test_a_lent_gpu_is_used(client, server, photo):
    log = server.folder.parent / "log"
    before = log.read_text().count("lent 120")
    ask(client, photo, "lesion")
    ask(client, photo, api_name="/unfold")
    assert log.read_text().count("lent 120") == before + 2


def test_a_broken_network_does_not_harm_the_others(client, server, photo):
    with refused("cannot be loaded right now"):
        ask(client, photo, "broken")
    with pytest.raises((gradio_client.exceptions.AppError, ValueError)):
        ask(client, photo, "no-such-network")
    assert ask(client, photo, "lesion")[1]["width"] == 200
    folder = server.folder.parent
    assert f"cannot load {folder / 'broken'}: " in (folder / "log").read_text()


# Modules.


@pytest.fixture
def parts(monkeypatch):
    """The modules of the demo, which import each other from their folder."""
    monkeypatch.syspath_prepend(SPACE)
    import answers
    import catalog
    import uploads

    yield SimpleNamespace(answers=answers, catalog=catalog, uploads=uploads)
    for name in ("answers", "catalog", "uploads"):
        sys.modules.pop(name)


def test_sources(parts, tmp_path, monkeypatch):
    choose = parts.catalog.choose_sources
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").touch()
    assert choose([f"camouflaged={folder}", "lesion = owner/srs@v1.0"]) == {
        "camouflaged": str(folder),
        "lesion": "owner/srs@v1.0",
    }
    assert choose(["owner/run"]) == {"camouflaged": "owner/run"}
    for given, words in (
        (["camouflaged="], "expected NAME=ID"),
        (["=owner/run"], "expected NAME=ID"),
        (["a=owner/run", "a=owner/srs"], "two networks named a"),
        (["a=no-such-folder"], "expected a folder or an id"),
        ([f"a={tmp_path}"], "without config.json"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            choose(given)
        assert "\n" not in str(caught.value)

    monkeypatch.setattr(parts.catalog, "__file__", str(tmp_path / "space" / "catalog.py"))
    with pytest.raises(ValueError, match=r"or train a tiny network with scripts/demo\.sh$"):
        choose([])
    best = tmp_path / "demo" / "run-1" / "segmentation" / "best"
    best.mkdir(parents=True)
    assert choose([]) == {"camouflaged": str(best)}


def test_networks_are_loaded_on_first_use_and_few_are_held(parts, monkeypatch):
    loaded = []
    monkeypatch.setattr(parts.catalog.Catalog, "_load", lambda self, source: loaded.append(source) or source)
    catalog = parts.catalog.Catalog({"a": "o/a", "b": "o/b", "c": "o/c"}, num_held=2)
    for name in "abacab":
        assert catalog[name] == f"o/{name}"
    assert loaded == ["o/a", "o/b", "o/c", "o/b"]  # c replaced b, the least recently used
    with pytest.raises(Exception, match="no such network here. Choose one of: a, b, c"):
        catalog["d"]


def test_an_old_checkpoint_says_that_it_cannot_show_stages(parts, monkeypatch):
    old = SimpleNamespace(model=SimpleNamespace())  # neither `unfold` nor `num_stages`
    monkeypatch.setattr(parts.catalog.Catalog, "_load", lambda self, source: old)
    catalog = parts.catalog.Catalog({"a": "o/a"}, num_held=1)
    assert catalog.may_unfold("a"), "the page asks, and shows the reason"
    with pytest.raises(parts.uploads.Refused, match="too old to show stages. Save it again"):
        parts.answers.Demo(catalog).stages("a", Image.new("RGB", (9, 9)))


PUBLIC = "8.8.8.8 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1"
PRIVATE = """127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1
    :: ::1 fe80::1 fd00::1 ff02::1 ::ffff:127.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: no"""


def test_public_addresses(parts):
    assert [address for address in PUBLIC.split() if not parts.uploads.is_public(address)] == []
    assert [address for address in PRIVATE.split() if parts.uploads.is_public(address)] == []


class Redirects(BaseHTTPRequestHandler):
    """Redirects by path, and files of given sizes."""

    def do_GET(self):
        kind, _, rest = self.path[1:].partition("/")
        self.send_response({"to": 302, "loop": 302, "gone": 404}.get(kind, 200))
        if kind in ("to", "loop"):
            self.send_header("Location", rest or self.path)
        if kind == "packed":
            self.send_header("Content-Encoding", "gzip, gzip")
        self.end_headers()
        if kind == "bytes":
            self.wfile.write(bytes(int(rest)))
        if kind == "packed":
            self.wfile.write(gzip.compress(gzip.compress(bytes(10**6))))

    def log_message(self, *_):
        pass


def test_fetching(parts, tmp_path, monkeypatch):
    uploads = parts.uploads
    real = uploads._public_address

    async def resolve(host):  # one name stands for the open internet
        return "127.0.0.1" if host == "public.test" else await real(host)

    monkeypatch.setattr(uploads, "_public_address", resolve)
    monkeypatch.setattr(uploads, "MAX_BYTES", 1000)
    monkeypatch.setattr(uploads, "SECONDS", PATIENCE)
    with web(Redirects) as port:
        for path, words in {
            "to/http://127.0.0.1/a.png": "not on the open internet",
            "to/file:///etc/passwd": "other than a web address",
            "to/ftp://public.test/a.png": "other than a web address",
            "gone": "answered with status 404",
            "bytes/2000": "is larger than 0 MB",
            "packed": "compressed data",
            "loop": "redirects more than 5 times",
        }.items():
            with pytest.raises(uploads.Refused, match=words):
                asyncio.run(uploads.fetch(f"http://public.test:{port}/{path}", tmp_path))
            assert list(tmp_path.iterdir()) == []
        found = asyncio.run(uploads.fetch(f"http://public.test:{port}/bytes/900", tmp_path))
    assert Path(found).read_bytes() == bytes(900)
    assert Path(found).name == "900"


def test_a_wrong_model_is_one_line_on_the_command_line():
    environment = {**os.environ, "UNCONCEAL_MODELS": "a=owner/a,\nb=nowhere"}
    command = [sys.executable, str(SPACE / "app.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: got 'nowhere', expected a folder")


def test_header_and_requirements():
    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert header["sdk_version"] == pins["gradio"], "the Space must run the tested version"
    assert len(header["short_description"]) <= 60
    # The requirements name every import, and the package is not one.
    needed = {re.match(r"[\w-]+", line).group() for line in (SPACE / "requirements.txt").read_text().splitlines()}
    sources = [path.read_text(encoding="utf-8") for path in SPACE.glob("*.py")]
    imported = {name for text in sources for name in re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE)}
    packages = {"PIL": "pillow", **dict.fromkeys(("gradio_client", "httpx", "safehttpx", "starlette"), "gradio")}
    own = {path.stem for path in SPACE.glob("*.py")} | {"spaces"}
    assert {packages.get(name, name) for name in imported - own - set(sys.stdlib_module_names)} <= needed
    assert "unconceal" not in imported


def test_examples_are_generated():
    """They may be published because our program drew them."""
    drawn = {
        **{f"camouflage-{n}.jpg": ("camouflage", (480, 640), index) for n, index in ((1, 0), (2, 2), (3, 3))},
        **{f"ultrasound-{n}.jpg": ("ultrasound", (480, 640), index) for n, index in ((1, 1), (2, 2))},
        **{f"infrared-{n}.png": ("infrared", 256, index) for n, index in ((1, 2), (2, 3))},
        **{f"intricate-{n}.jpg": ("intricate", (720, 960), index) for n, index in ((1, 1), (2, 3))},
    }
    assert {path.name for path in (SPACE / "examples").iterdir()} == set(drawn)
    for name, (kind, size, index) in drawn.items():
        image, _ = generate(kind, size, seed=7, index=index)
        example = Image.open(SPACE / "examples" / name).convert("RGB")
        difference = np.abs(np.asarray(image, int) - np.asarray(example, int)).mean()
        assert difference < 8, f"`generate` does not draw {name}"  # JPEG alters the noise of ultrasound


def test_it_can_be_pushed_as_it_is():
    files = set(stage_space(SPACE, "owner/demo").files)
    assert {"app.py", "README.md", "requirements.txt", "page/viewer.js", "examples/camouflage-1.jpg"} <= files
    assert not [name for name in files if name.endswith((".pyi", ".pyc"))]
