"""The web demo as programs meet it: a server in a process of its own, without the package, asked over HTTP."""

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

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from save_tiny_models import save_tiny_models
from skimage import measure

from unconceal.api import cutout, load, mask_to_image
from unconceal.data.synthetic import generate
from unconceal.drawing.explain import unfold
from unconceal.hub.stage import stage_space


gradio_client = pytest.importorskip("gradio_client", reason="the demo needs the extra `space`")
pytest.importorskip("gradio", reason="the demo needs the extra `space`")

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "space"
NETWORKS = {"camouflaged": "run", "lesion": "srs", "cut-out": "opds"}
# In the place of what a ZeroGPU Space has: arguments and results go to another process and back.
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
        folder: Where its temporary files lie.
    """

    url: str
    process: subprocess.Popen
    folder: Path

    def client(self):
        return gradio_client.Client(self.url, verbose=False, download_files=self.folder.parent / "downloads")

    def memory(self) -> int:
        """Bytes of physical memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1])

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]


@contextmanager
def serve(models: dict[str, Path], folder: Path, *options: str, **variables: str):
    """Start the demo with temporary files in `folder` / "temporary", and stop it at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "temporary").mkdir(parents=True)
    pairs = [f"{name}={path}" for name, path in models.items()]
    command = [sys.executable, str(SPACE / "app.py"), "--port", str(port), *options, "--model", *pairs]
    environment = {**os.environ, "TMPDIR": str(folder / "temporary"), "HF_HOME": str(folder / "hub"), **variables}
    log = folder / "log"
    with log.open("w") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            if process.poll() is not None:
                break
            try:
                httpx.get(url, timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        assert process.poll() is None, log.read_text()
        yield Server(url, process, folder / "temporary")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))[0].parent


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    """A demo that is lent a GPU and has one network that is broken."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{}")
    (folder / "lent").mkdir()
    (folder / "lent" / "spaces.py").write_text(LENDER)
    named = {name: models / kind for name, kind in NETWORKS.items()}
    variables = {"PYTHONPATH": str(folder / "lent"), "PYTHONUNBUFFERED": "1"}
    with serve({**named, "broken": folder / "broken"}, folder, **variables) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A JPEG three times the networks' size, turned a quarter by its EXIF orientation."""
    pixels = np.random.default_rng(1).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((150, 200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path_factory.mktemp("photo") / "photo of a hill.jpg"
    picture.save(path, exif=exif)
    return path


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def ask(client, path, network="camouflaged", api_name="/segment", **options):
    return client.predict(gradio_client.handle_file(path), network, **options, api_name=api_name)


# What it gives.


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_answers_equal_the_library(client, models, photo, network):
    segmenter, picture = load(models / NETWORKS[network], device="cpu"), Image.open(photo)
    (fine,), (coarse,) = (segmenter.segment([picture], refine=refine) for refine in ("auto", "never"))
    assert not np.array_equal(mask_to_image(fine), mask_to_image(coarse))

    path, report = ask(client, photo, network)
    np.testing.assert_array_equal(pixels(path), mask_to_image(fine))
    assert Path(path).name == "photo of a hill_mask.png"
    np.testing.assert_array_equal(pixels(ask(client, photo, network, fine_edges=False)[0]), mask_to_image(coarse))
    np.testing.assert_array_equal(pixels(ask(client, photo, network, "/cutout")), cutout(picture, fine))

    assert (report["width"], report["height"]) == (200, 150)
    assert report["network"] == network
    assert report["model"] == NETWORKS[network].upper()
    assert report["seconds"] > 0
    assert report["device"] == "cpu"
    assert report["share"] == pytest.approx((fine > 0.5).mean())
    parts = sorted(measure.regionprops(measure.label(fine > 0.5)), key=lambda part: -part.area)
    assert [box["area"] for box in report["boxes"]] == [part.area for part in parts][:50]
    assert parts, "nothing was found"
    top, left, bottom, right = parts[0].bbox
    assert report["boxes"][0] == {
        **{"x": left, "y": top, "width": right - left, "height": bottom - top},
        "area": parts[0].area,
    }


def test_stages_equal_the_library(client, models, photo):
    unfolding = unfold(load(models / "run", device="cpu"), Image.open(photo))
    shown = {one["caption"]: pixels(one["image"]) for one in ask(client, photo, api_name="/unfold")}
    assert len(shown) == 4 * len(unfolding.stages) - 1  # no edge yet in the coarse start
    for k, stage in enumerate(unfolding.stages):
        for kind in ("mask", "edge", "background"):
            expected = getattr(stage, kind)
            assert (expected is not None) == (f"{k} {kind}" in shown)
            if expected is not None:
                # The library enlarges before it rounds, and at borders between positions mixes two.
                difference = np.abs(255 * expected.clip(0, 1) - shown[f"{k} {kind}"])
                assert np.median(difference) <= 0.5 + 1e-3
                assert (difference <= 0.51).mean() > 0.7
        # The colours of uncertainty grow lighter.
        light = shown[f"{k} uncertainty"].astype(int).sum(-1)
        order = np.argsort(stage.uncertainty.ravel())
        assert light.ravel()[order[-100:]].mean() > light.ravel()[order[:100]].mean()


def test_a_network_without_stages_says_so(client, photo):
    with pytest.raises(gradio_client.exceptions.AppError, match="in one step; RUN unfolds"):
        ask(client, photo, "lesion", "/unfold")


@pytest.mark.slow
def test_batch(client, models, photo, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    turned = tmp_path / "=turned.jpg"  # its orientation cannot be read, so it lies as it is stored
    Image.open(photo).save(turned, exif=b"Exif\0\0no header of a TIFF")
    other = tmp_path / "photo of a hill.png"  # the name of the first, in another format
    Image.open(SPACE / "examples" / "infrared-1.png").resize((70, 50)).save(other)
    files = [gradio_client.handle_file(path) for path in (photo, text, turned, other)]
    archive, report = client.predict(files, "lesion", ["mask", "cutout", "mask"], api_name="/segment_batch")

    rows = report["data"]
    assert [row[:4] for row in rows] == [
        [photo.name, "done", 200, 150],
        ["text.png", "This is no picture that can be read. JPEG, PNG, WebP, TIFF and most others work.", None, None],
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

    for wrong, words in (([], "no pictures yet"), (files * 13, "Got 52 pictures")):
        with pytest.raises(gradio_client.exceptions.AppError, match=words):
            client.predict(wrong, "lesion", api_name="/segment_batch")


def test_the_snippet_on_the_page_runs(server, photo, tmp_path):
    page = (SPACE / "page" / "program.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for name, used in (("OWNER/SPACE", server.url), ("photo.jpg", photo)):
        assert name in snippet
        snippet = snippet.replace(name, str(used))
    result = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    path, boxes = result.stdout.splitlines()[-1].split(".png ", 1)
    assert pixels(f"{path}.png").shape == (150, 200)
    assert ast.literal_eval(boxes)[0]["area"] > 0
    for name in re.findall(r"`(/\w+)`", page):
        assert name in client_endpoints(server), f"{name} is documented and is not there"


def client_endpoints(server) -> set[str]:
    return set(server.client().view_api(return_format="dict")["named_endpoints"])


def test_only_what_is_documented_can_be_called(server):
    assert client_endpoints(server) == {"/segment", "/cutout", "/unfold", "/segment_batch"}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *[
            (f"a.{suffix}", "RGB")
            for suffix in ("avif", "bmp", "gif", "jp2", "jpg", "png", "ppm", "tga", "tif", "webp")
        ],
        *[("grey.png", "L"), ("deep.png", "I;16"), ("clear.png", "RGBA"), ("palette.png", "P"), ("print.jpg", "CMYK")],
    ],
)
def test_formats(client, models, tmp_path, name, mode):
    grey = np.random.default_rng(2).integers(0, 256, (40, 50), dtype=np.uint8)
    picture = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    picture.save(tmp_path / name)
    path, _ = ask(client, tmp_path / name, "lesion")
    (mask,) = load(models / "srs", device="cpu").segment([Image.open(tmp_path / name)])
    np.testing.assert_array_equal(pixels(path), mask_to_image(mask))


# That it holds.


def png_header(width: int, height: int) -> bytes:
    """A PNG file that says it is of that size and holds a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
HTML = b"<html><script>alert(1)</script></html>"
NO_PICTURE = "no picture that can be read"
HOSTILE = {
    "bomb.png": (png_header(65_535, 65_535), "more than 50 megapixels"),
    "200-megapixels.png": (png_header(20_000, 10_000), "more than 50 megapixels"),
    "just-too-large.png": (png_header(50_000_001, 1), "more than 50 megapixels"),
    "cut-short.png": (png_header(60, 60), "damaged"),
    "picture.svg": (SVG, NO_PICTURE),
    "svg.png": (SVG, NO_PICTURE),
    "page.png": (HTML, NO_PICTURE),
    "page.html": (HTML, NO_PICTURE),
    "empty.png": (b"", NO_PICTURE),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", NO_PICTURE),
    "archive.png": (b"PK\x03\x04" + b"\0" * 60, NO_PICTURE),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(client, photo, tmp_path, name):
    content, words = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(content)
    for api_name in ("/segment", "/cutout", "/unfold"):
        with pytest.raises(gradio_client.exceptions.AppError, match=words):
            ask(client, path, api_name=api_name)
    _, report = client.predict([gradio_client.handle_file(path)], "lesion", api_name="/segment_batch")
    assert words in report["data"][0][1]


@pytest.fixture(scope="module")
def inside(photo):
    """A server on this machine with a picture, and the requests that it got."""
    seen = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=photo.parent)) as inner:
        threading.Thread(target=inner.serve_forever, daemon=True).start()
        yield inner.server_port, seen
        inner.shutdown()


def test_addresses_that_lead_inside_are_not_fetched(client, server, photo, inside):
    port, seen = inside
    name = photo.name.replace(" ", "%20")
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "127.1"):
        address = {"path": f"http://{host}:{port}/{name}", "meta": {"_type": "gradio.FileData"}}
        with pytest.raises(gradio_client.exceptions.AppError, match=r"not on the open internet|no such address"):
            client.predict(address, "lesion", api_name="/segment")
        with pytest.raises(gradio_client.exceptions.AppError, match="many pictures at once must be files"):
            client.predict([address], "lesion", api_name="/segment_batch")
        assert httpx.get(f"{server.url}/gradio_api/file=http://{host}:{port}/{name}").status_code == 403
    for address in ("http://169.254.169.254/latest/meta-data", "http://10.0.0.1/a.png", "http://100.64.0.1/a.png"):
        with pytest.raises(gradio_client.exceptions.AppError, match="not on the open internet"):
            client.predict({"path": address, "meta": {"_type": "gradio.FileData"}}, "lesion", api_name="/segment")
    assert seen == []


def answer_to(server, given: dict) -> str:
    """What a request of `/segment` comes to that no client would send: "complete" or "error"."""
    call = f"{server.url}/gradio_api/call/segment"
    started = httpx.post(call, json={"data": [given, "lesion", True]})
    if started.status_code >= 400:
        return "error"
    return re.match(r"event: (\w+)", httpx.get(f"{call}/{started.json()['event_id']}", timeout=60).text)[1]


def test_no_file_of_the_machine_is_read(server, photo, tmp_path):
    meta = {"meta": {"_type": "gradio.FileData"}}
    outside = tmp_path / "picture.png"  # a picture, so that nothing but its place speaks against it
    Image.open(photo).save(outside)
    (inside,) = httpx.post(f"{server.url}/gradio_api/upload", files={"files": ("a.png", outside.read_bytes())}).json()
    assert answer_to(server, {"path": inside, **meta}) == "complete"
    climbing = f"{Path(inside).parent}/../../../../{outside.relative_to(server.folder.parents[1])}"
    assert Path(climbing).samefile(outside)

    example = SPACE / "examples" / "camouflage-1.jpg"
    folder = Path(inside).parents[1]
    for path in (folder, outside, climbing, f"file://{outside}", example, "examples/camouflage-1.jpg", "/etc/passwd"):
        for extra in (meta, {}, {"url": f"{server.url}/gradio_api/file={inside}", **meta}):
            assert answer_to(server, {"path": str(path), **extra}) == "error", (path, extra)
    for path in (
        outside,
        climbing,
        "/etc/passwd",
        "file:///etc/passwd",
        SPACE / "app.py",
        server.folder.parent / "log",
    ):
        assert httpx.get(f"{server.url}/gradio_api/file={path}").status_code >= 400, path
    assert answer_to(server, {"url": "data:image/png;base64,iVBORw0KGgo=", "path": None, **meta}) == "error"
    for path in ("/../../etc/passwd", "/static/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/app.py"):
        response = httpx.get(f"{server.url}{path}")
        assert "root:" not in response.text
        assert "def main" not in response.text


def test_an_uploaded_page_is_not_shown_as_one(server):
    for name, content in (("page.html", HTML), ("picture.svg", SVG)):
        (path,) = httpx.post(f"{server.url}/gradio_api/upload", files={"files": (name, content)}).json()
        response = httpx.get(f"{server.url}/gradio_api/file={path}")
        assert response.headers["content-disposition"].startswith("attachment")
        assert response.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(
    "route", ["file=https://example.com/a.png", "file=HTTP://example.com", "proxy=https://a.hf.space/"]
)
def test_routes_that_fetch_for_anybody_are_closed(server, route):
    assert httpx.get(f"{server.url}/gradio_api/{route}").status_code == 403


def test_nothing_passes_by_the_queue(server):
    assert httpx.get(f"{server.url}/gradio_api/deep_link?session_hash=a").status_code == 403
    for name in ("segment", "cutout", "unfold", "segment_batch"):
        for route in (f"api/{name}", f"run/{name}"):
            response = httpx.post(f"{server.url}/gradio_api/{route}", json={"data": [None, "lesion", True]})
            assert response.status_code >= 400
            assert "queue" in response.text


def in_parts(size: int):
    """A body that does not say how large it is."""
    for _ in range(size // 2**16):
        yield bytes(2**16)


@pytest.mark.parametrize("content", [bytes(2 * 2**20), in_parts(2 * 2**20)], ids=["stated", "in parts"])
def test_too_large_a_message_is_refused(server, content):
    with contextlib.suppress(httpx.TransportError):  # or the line is cut
        response = httpx.post(f"{server.url}/gradio_api/queue/join", content=content, timeout=60)
        assert response.status_code >= 400
    assert httpx.get(server.url).status_code == 200


def test_too_large_a_file_is_refused(server):
    class Zeros(io.RawIOBase):
        left = 129 * 2**20

        def read(self, size=-1):
            size = min(self.left, 2**20)
            self.left -= size
            return bytes(size)

    response = httpx.post(f"{server.url}/gradio_api/upload", files={"files": ("a.png", Zeros())}, timeout=120)
    assert response.status_code == 413


def test_what_is_not_offered_is_refused(client, photo):
    with pytest.raises((gradio_client.exceptions.AppError, ValueError)):
        ask(client, photo, "no-such-network")


@pytest.mark.slow
def test_many_clients_at_once(server, models, tmp_path):
    draw = np.random.default_rng(3)
    segmenter = load(models / "srs", device="cpu")
    paths, masks = [], []
    for index in range(100):
        picture = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        picture = picture.resize((60 + index, 90), Image.Resampling.BICUBIC)  # no two of one size
        paths.append(tmp_path / f"{index}.png")
        picture.save(paths[-1])
        masks.append(np.asarray(mask_to_image(segmenter.segment([picture])[0])))
    assert len({mask.tobytes() for mask in masks}) == 100

    def one_client(start: int):
        client = server.client()
        for index in range(start, start + 5):
            path, report = ask(client, paths[index], "lesion")
            np.testing.assert_array_equal(pixels(path), masks[index])
            assert report["width"] == 60 + index

    for start in range(0, 20, 5):  # what the first requests allocate once
        one_client(start)
    before = server.memory()
    with ThreadPoolExecutor(20) as clients:
        for done in [clients.submit(one_client, start) for start in range(0, 100, 5)]:
            done.result()
    after = server.memory()
    assert after < 1.1 * before, f"{before / 2**20:.0f} MiB before, {after / 2**20:.0f} after"


@pytest.mark.slow
def test_nothing_stays_on_disk(models, photo, tmp_path):
    with serve({"lesion": models / "srs"}, tmp_path, "--kept", "10") as server:
        client = server.client()
        ask(client, photo, "lesion")
        ask(client, photo, "lesion", "/cutout")
        client.predict([gradio_client.handle_file(photo)], "lesion", api_name="/segment_batch")
        # What gradio itself loses sight of: a part of another name, and an upload that is broken off.
        httpx.post(f"{server.url}/gradio_api/upload", files={"other": ("a.png", bytes(1000))})
        with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as broken:
            broken.sendall(
                b"POST /gradio_api/upload HTTP/1.1\r\nHost: a\r\nContent-Length: 3000000\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
                b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(10**6)
            )
            time.sleep(0.5)
        assert server.files()
        (uploads,) = server.folder.glob("unconceal-space-*")
        assert all(path.is_relative_to(uploads) for path in server.files())
        for _ in range(200):
            if not list(uploads.iterdir()):
                break
            time.sleep(0.2)
        assert list(uploads.iterdir()) == []
        # What is gone is said to be gone.
        gone = {"path": str(uploads / "0" / "photo.jpg"), "meta": {"_type": "gradio.FileData"}}
        assert answer_to(server, gone) == "error"
        ask(client, photo, "lesion")
    assert list(server.folder.glob("unconceal-space-*")) == []


def test_a_lent_gpu_is_asked_for(client, server, photo):
    log = server.folder.parent / "log"
    before = log.read_text().count("lent 120")
    ask(client, photo, "lesion")
    ask(client, photo, api_name="/unfold")
    assert log.read_text().count("lent 120") == before + 2


def test_a_network_that_does_not_load_harms_no_other(client, server, photo):
    with pytest.raises(gradio_client.exceptions.AppError, match="cannot be loaded at the moment"):
        ask(client, photo, "broken")
    assert ask(client, photo, "lesion")[1]["width"] == 200
    folder = server.folder.parent
    assert f"cannot load {folder / 'broken'}: " in (folder / "log").read_text()


# Its parts.


@pytest.fixture
def parts(monkeypatch):
    """The modules of the demo, which find each other by their folder."""
    monkeypatch.syspath_prepend(SPACE)
    import networks
    import pictures

    yield networks, pictures
    for name in ("networks", "pictures"):
        sys.modules.pop(name)


def test_sources(parts, tmp_path, monkeypatch):
    networks, _ = parts
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").touch()
    assert networks.choose_sources([f"camouflaged={folder}", "lesion = owner/srs@v1.0"]) == {
        "camouflaged": str(folder),
        "lesion": "owner/srs@v1.0",
    }
    assert networks.choose_sources(["owner/run"]) == {"camouflaged": "owner/run"}
    for given, words in (
        (["camouflaged="], "expected NAME=ID"),
        (["=owner/run"], "expected NAME=ID"),
        (["a=owner/run", "a=owner/srs"], "two networks named a"),
        (["a=no-such-folder"], "no folder and no id"),
        ([f"a={tmp_path}"], "without config.json"),
    ):
        with pytest.raises(ValueError) as caught:
            networks.choose_sources(given)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    monkeypatch.setattr(networks, "__file__", str(tmp_path / "space" / "networks.py"))
    with pytest.raises(ValueError, match=r"or train a tiny one by scripts/demo\.sh$"):
        networks.choose_sources([])
    best = tmp_path / "demo" / "run-1" / "segmentation" / "best"
    best.mkdir(parents=True)
    assert networks.choose_sources([]) == {"camouflaged": str(best)}


def test_networks_are_loaded_late_and_few_are_held(parts, monkeypatch):
    networks, _ = parts
    loaded = []
    monkeypatch.setattr(networks.Networks, "_load", lambda self, source: loaded.append(source) or source)
    held = networks.Networks({"a": "o/a", "b": "o/b", "c": "o/c"}, num_held=2)
    assert loaded == []
    for name in "abacab":
        assert held[name] == f"o/{name}"
    assert loaded == ["o/a", "o/b", "o/c", "o/b"]  # c took the place of b, the one not used for longest
    with pytest.raises(Exception, match="no such network here; there are a, b, c"):
        held["d"]


class Leading(BaseHTTPRequestHandler):
    """Redirects as its paths say, and files of some sizes."""

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


def test_public_addresses(parts):
    _, pictures = parts
    for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"):
        assert pictures.is_public(address), address
    inside = (
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
    )
    others = (
        "::",
        "::1",
        "fe80::1",
        "fd00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "no",
    )
    for address in (*inside, *others):
        assert not pictures.is_public(address), address


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("to/http://127.0.0.1/a.png", "not on the open internet"),
        ("to/file:///etc/passwd", "no web address"),
        ("to/ftp://public.test/a.png", "no web address"),
        ("gone", "answered with 404"),
        ("bytes/2000", "has more than 0 MB"),
        ("packed", "compressed bytes"),
        ("loop", "leads on more than 5 times"),
    ],
)
def test_fetching(parts, tmp_path, monkeypatch, path, words):
    _, pictures = parts
    real = pictures._public_address

    async def resolve(host):  # the open internet is not at hand: one name stands for it
        return "127.0.0.1" if host == "public.test" else await real(host)

    monkeypatch.setattr(pictures, "_public_address", resolve)
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    with ThreadingHTTPServer(("127.0.0.1", 0), Leading) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        start = f"http://public.test:{web.server_port}"
        with pytest.raises(pictures.Refused, match=words):
            asyncio.run(pictures.fetch(f"{start}/{path}", tmp_path))
        assert list(tmp_path.iterdir()) == []
        found = asyncio.run(pictures.fetch(f"{start}/bytes/900", tmp_path))
        assert Path(found).read_bytes() == bytes(900)
        assert Path(found).name == "900"
        web.shutdown()


def test_command_line():
    environment = {**os.environ, "UNCONCEAL_MODELS": "a=owner/a,\nb=nowhere"}
    command = [sys.executable, str(SPACE / "app.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: got 'nowhere', which is no folder")


def test_header_and_requirements():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1])
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert header["sdk"] == "gradio"
    assert header["sdk_version"] == pins["gradio"], "the Space runs what is tested"
    assert len(header["short_description"]) <= 60
    assert header["license"] == "apache-2.0"
    assert (SPACE / header["app_file"]).is_file()
    # Whatever it imports is asked for, and the package is not.
    needed = {re.match(r"[\w-]+", line).group() for line in (SPACE / "requirements.txt").read_text().splitlines()}
    imported = set()
    for path in SPACE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    theirs = {
        "PIL": "pillow",
        "gradio_client": "gradio",
        **dict.fromkeys(("httpx", "safehttpx", "starlette"), "gradio"),
    }
    own = {path.stem for path in SPACE.glob("*.py")} | {"spaces"}
    assert {theirs.get(name, name) for name in imported - own - set(sys.stdlib_module_names)} <= needed
    assert "unconceal" not in imported


def test_examples_are_generated():
    """They may be published because a program of ours drew them."""
    drawn = {
        **{f"camouflage-{n}.jpg": ("camouflage", (480, 640), index) for n, index in ((1, 0), (2, 2), (3, 3))},
        **{f"ultrasound-{n}.jpg": ("ultrasound", (480, 640), index) for n, index in ((1, 1), (2, 2))},
        **{f"infrared-{n}.png": ("infrared", 256, index) for n, index in ((1, 2), (2, 3))},
        **{f"intricate-{n}.jpg": ("intricate", (720, 960), index) for n, index in ((1, 1), (2, 3))},
    }
    assert {path.name for path in (SPACE / "examples").iterdir()} == set(drawn)
    for name, (kind, size, index) in drawn.items():
        picture, _ = generate(kind, size, seed=7, index=index)
        example = Image.open(SPACE / "examples" / name).convert("RGB")
        difference = np.abs(np.asarray(picture, int) - np.asarray(example, int)).mean()
        assert difference < 8, f"{name} is not what `generate` draws"  # the noise of ultrasound suffers from JPEG


def test_it_can_be_pushed_as_it_is():
    files = set(stage_space(SPACE, "owner/demo").files)
    assert {"app.py", "README.md", "requirements.txt", "page/viewer.js", "examples/camouflage-1.jpg"} <= files
    assert not [name for name in files if name.endswith((".pyi", ".pyc"))]
    for name in files:
        assert (SPACE / name).stat().st_size < 300_000
