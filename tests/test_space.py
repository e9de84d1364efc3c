"""The web demo as programs use it: asked over HTTP, or part by part."""

import ast
import asyncio
import contextlib
import csv
import gzip
import importlib
import io
import re
import signal
import socket
import struct
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from skimage import measure
from space_server import NETWORKS, PATIENCE, SPACE

from unconceal.api import cutout, load
from unconceal.data.synthetic import generate
from unconceal.hub.stage import stage_space
from unconceal.models.cutout import mask_to_image


gradio_client = pytest.importorskip("gradio_client", reason="the demo needs the extra `space`")
pytest.importorskip("gradio", reason="the demo needs the extra `space`")

pytest_plugins = "space_server"  # has the fixtures `models` and `server`
META = {"meta": {"_type": "gradio.FileData"}}


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


def upload_all(paths) -> list[dict]:
    return [gradio_client.handle_file(path) for path in paths]


def ask(client, path, network="camouflaged", api_name="/segment", **options):
    return client.predict(gradio_client.handle_file(path), network, **options, api_name=api_name)


def refused(match: str):
    return pytest.raises(gradio_client.exceptions.AppError, match=match)


# Answers.


@pytest.mark.slow
@pytest.mark.parametrize("network", ["camouflaged", "cut-out"])
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


def test_stages_equal_the_library(client, server, models, photo):
    lent = server.log().count("lent 120")
    unfolding = load(models / "run", device="cpu").unfold(Image.open(photo), (200, 150))
    expected = {
        f"{k} {kind}": image for k, stage in enumerate(unfolding.stages) for kind, image in stage.images().items()
    }
    shown = {one["caption"]: one["image"] for one in ask(client, photo, api_name="/unfold")}
    assert shown.keys() == expected.keys()
    assert len(shown) == 4 * len(unfolding.stages) - 1  # the coarse start has no edge
    for caption, path in shown.items():
        np.testing.assert_array_equal(np.asarray(Image.open(path).convert("RGB")), expected[caption].convert("RGB"))
    with refused("Only RUN shows stages"):
        ask(client, photo, "lesion", "/unfold")
    assert server.log().count("lent 120") == lent + 1, "the GPU of a Space was not used"


def test_batch(client, server, models, photo, tmp_path):
    lent = server.log().count("lent 120")
    text = tmp_path / "text.png"
    text.write_text("not an image")
    turned = tmp_path / "=turned.jpg"  # its orientation is unreadable, so it stays as stored
    Image.open(photo).save(turned, exif=b"Exif\0\0no header of a TIFF")
    other = tmp_path / "photo of a hill.png"  # same stem as the first, other format
    Image.open(SPACE / "examples" / "infrared-1.png").resize((70, 50)).save(other)
    files = upload_all((photo, text, turned, other))
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
    uploads = server.uploads()
    assert all(path.is_relative_to(uploads) for path in server.files()), "a result outside the folder that is swept"
    assert server.log().count("lent 120") == lent + 3, "the GPU of a Space was not used"

    for wrong, words in (([], "Add images first"), (files * 13, "Got 52 images")):
        with refused(words):
            client.predict(wrong, "lesion", api_name="/segment_batch")


def test_documented_api_works_and_is_complete(server, client, photo, capsys):
    page = (SPACE / "page" / "program.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for name, used in (("OWNER/SPACE", server.url), ("photo.jpg", photo)):
        assert name in snippet
        snippet = snippet.replace(name, str(used))
    exec(snippet, {})
    path, boxes = capsys.readouterr().out.splitlines()[-1].split(".png ", 1)
    assert pixels(f"{path}.png").shape == (150, 200)
    assert ast.literal_eval(boxes)[0]["area"] > 0
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == set(re.findall(r"`(/\w+)`", page))
    for name, endpoint in endpoints.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"- `{name}`"))
        assert all(f"`{parameter['parameter_name']}`" in line for parameter in endpoint["parameters"])


def test_formats_and_color_modes(client, models, tmp_path):
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 50), dtype=np.uint8))
    for suffix in ("avif", "bmp", "gif", "jp2", "jpg", "png", "ppm", "tga", "tif", "webp"):
        noise.convert("RGB").save(tmp_path / f"{suffix}.{suffix}")
    for mode in ("L", "RGBA", "P", "CMYK"):
        noise.convert(mode).save(tmp_path / f"mode-{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    Image.fromarray(np.asarray(noise, np.uint16) * 257).save(tmp_path / "mode-I16.png")
    paths = sorted(tmp_path.iterdir())
    archive, _ = client.predict(upload_all(paths), "lesion", api_name="/segment_batch")
    masks = load(models / "srs", device="cpu").segment([Image.open(path) for path in paths])
    with zipfile.ZipFile(archive) as results:
        for path, mask in zip(paths, masks, strict=True):
            found = pixels(io.BytesIO(results.read(f"{path.stem}_mask.png")))
            np.testing.assert_array_equal(found, mask_to_image(mask), err_msg=path.name)


# Guards.


def sized(width: int, height: int) -> bytes:
    """Return a BMP that claims a size but holds one pixel."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "BMP")
    content = buffer.getvalue()
    return content[:18] + struct.pack("<ii", width, height) + content[26:]


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
TOO_LARGE, NO_IMAGE = "more than 50 megapixels", "not an image we can read"
HOSTILE = {
    "bomb.bmp": (sized(65_535, 65_535), TOO_LARGE),
    "just-too-large.bmp": (sized(50_000_001, 1), TOO_LARGE),
    "cut-short.bmp": (sized(60, 60), "damaged"),
    "image.svg": (SVG, NO_IMAGE),
    "svg.png": (SVG, NO_IMAGE),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", NO_IMAGE),
}


def test_hostile_files_are_refused(client, tmp_path):
    paths = [tmp_path / name for name in HOSTILE]
    for path in paths:
        path.write_bytes(HOSTILE[path.name][0])
    _, report = client.predict(upload_all(paths), "lesion", api_name="/segment_batch")
    for path, row in zip(paths, report["data"], strict=True):
        assert HOSTILE[path.name][1] in row[1], path.name
    for api_name in ("/segment", "/cutout", "/unfold"):
        with refused(TOO_LARGE):
            ask(client, paths[0], api_name=api_name)


def test_private_addresses_are_not_fetched(client, server):
    address = {"path": f"{server.url}/a.png", **META}
    with refused("not on the open internet"):
        client.predict(address, "lesion", api_name="/segment")
    with refused("A batch accepts files only"):
        client.predict([address], "lesion", api_name="/segment_batch")


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
    climbing = f"{Path(uploaded).parent}/../../../../{outside.relative_to(server.folder.parent)}"
    assert Path(climbing).samefile(outside)

    folder, example = Path(uploaded).parents[1], SPACE / "examples" / "camouflage-1.jpg"
    given = [{"path": str(path), **META} for path in (folder, climbing, f"file://{outside}", example, "/etc/passwd")]
    for extra in (META, {}, {"url": f"{server.url}/gradio_api/file={uploaded}", **META}):
        given.append({"path": str(outside), **extra})
    given.append({"url": "data:image/png;base64,iVBORw0KGgo=", "path": None, **META})
    for one in given:
        assert outcome(server, one) == "error", one
    for path in (outside, climbing, "/etc/passwd", "file:///etc/passwd", SPACE / "app.py", server.folder / "log"):
        assert server.get(f"/gradio_api/file={path}").status_code >= 400, path
    for path in ("/../../etc/passwd", "/static/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/app.py"):
        text = server.get(path).text
        assert "root:" not in text
        assert "def main" not in text


def test_an_uploaded_page_is_only_a_download(server):
    for name, content in (("page.html", b"<html><script>alert(1)</script></html>"), ("image.svg", SVG)):
        response = server.get(f"/gradio_api/file={server.upload(name, content)}")
        assert response.headers["content-disposition"].startswith("attachment")
        assert response.headers["content-type"] == "application/octet-stream"


def test_routes_that_the_demo_does_not_need_are_closed(server):
    for route in ("file=https://a.org/a.png", "file=HTTP://a.org", "proxy=https://a.hf.space/", "deep_link?a=b"):
        assert server.get(f"/gradio_api/{route}").status_code == 403, route


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


def test_many_clients_at_once_get_their_own_answers(server, models, tmp_path):
    draw = np.random.default_rng(3)
    segmenter = load(models / "srs", device="cpu")
    cases = []
    for index in range(12):
        image = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        image = image.resize((60 + index, 90), Image.Resampling.BICUBIC)  # all of different size
        image.save(tmp_path / f"{index}.png")
        cases.append((tmp_path / f"{index}.png", np.asarray(mask_to_image(segmenter.segment([image])[0]))))

    def one_client(number: int):
        client = server.client()
        for image, mask in cases[number::4]:
            path, report = ask(client, image, "lesion")
            np.testing.assert_array_equal(pixels(path), mask)
            assert report["width"] == mask.shape[1]

    with ThreadPoolExecutor(4) as clients:
        list(clients.map(one_client, range(4)))


def test_an_interrupted_upload_lies_where_it_is_swept(server):
    before = server.files()
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as broken:
        broken.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: a\r\nContent-Length: 3000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(10**6)
        )
        started = time.monotonic()
        while not (found := server.files() - before) and time.monotonic() < started + PATIENCE:
            time.sleep(0.05)
    assert found
    assert all(path.is_relative_to(server.uploads()) for path in found)


def test_a_broken_network_does_not_harm_the_others(client, server, photo):
    with refused("cannot be loaded right now"):
        ask(client, photo, "broken")
    with pytest.raises((gradio_client.exceptions.AppError, ValueError)):
        ask(client, photo, "no-such-network")
    assert ask(client, photo, "lesion")[1]["width"] == 200
    assert f"cannot load {server.folder / 'broken'}: " in server.log()


# Modules.


@pytest.fixture(scope="module")
def parts():
    """The modules of the demo, which import each other from their folder."""
    names = ("answers", "app", "catalog", "guard", "uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SPACE)
        patch.setenv("GRADIO_TEMP_DIR", "")  # app.py sets it
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name)


def test_uploads_are_deleted_after_a_while(parts, tmp_path):
    file = tmp_path / "session" / "a.png"
    file.parent.mkdir()
    file.write_bytes(bytes(1000))
    assert parts.guard.used_bytes(tmp_path) == 1000
    parts.guard.sweep(tmp_path, 3600)
    assert file.exists()
    parts.guard.sweep(tmp_path, -1)
    assert list(tmp_path.iterdir()) == []


def test_command_line(parts, models, monkeypatch, capsys):
    swept, launched = [], []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)  # `main` sets it, and the handler of a signal
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(parts.app, "keep_swept", lambda *given: swept.append(given))
    monkeypatch.setattr(parts.app.gr.Blocks, "launch", lambda page, **options: launched.append(options))
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", f"lesion={models / 'srs'}", "--kept", "5"])
    assert parts.app.main() == 0
    assert swept == [(parts.uploads.upload_folder(), 5)]
    assert launched[0]["server_name"] == "127.0.0.1"

    monkeypatch.setenv("UNCONCEAL_MODELS", "a=owner/a,\nb=nowhere")
    monkeypatch.setattr(sys, "argv", ["app.py"])
    assert parts.app.main() == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("error: got 'nowhere', expected a folder")
    assert len(launched) == 1


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

    shipped = {"polyp": str(folder)}
    monkeypatch.setattr(parts.catalog, "shipped_sources", lambda: shipped)
    assert choose(["polyp", "a=polyp", "b=owner/run"]) == {"polyp": str(folder), "a": str(folder), "b": "owner/run"}
    assert choose([]) == shipped

    shipped = {}
    monkeypatch.setattr(parts.catalog, "__file__", str(tmp_path / "space" / "catalog.py"))
    with pytest.raises(ValueError, match=r"or train a tiny network with scripts/demo\.sh$"):
        choose([])
    best = tmp_path / "demo" / "run-1" / "segmentation" / "best"
    best.mkdir(parents=True)
    assert choose([]) == {"demo": str(best)}


def test_networks_are_loaded_on_first_use_and_few_are_held(parts, monkeypatch):
    loaded = []
    monkeypatch.setattr(parts.catalog.Catalog, "_load", lambda self, source: loaded.append(source) or source)
    catalog = parts.catalog.Catalog({"a": "o/a", "b": "o/b", "c": "o/c"}, num_held=2)
    for name in "abacab":
        assert catalog[name] == f"o/{name}"
    assert loaded == ["o/a", "o/b", "o/c", "o/b"]  # c replaced b, the least recently used
    with pytest.raises(Exception, match="no such network here. Choose one of: a, b, c"):
        catalog["d"]


def test_an_old_checkpoint_shows_no_stages(parts, monkeypatch):
    old = SimpleNamespace(model=SimpleNamespace())  # neither `unfold` nor `num_stages`
    monkeypatch.setattr(parts.catalog.Catalog, "_load", lambda self, source: old)
    with pytest.raises(parts.uploads.Refused, match="save it again with the current version"):
        parts.answers.Demo(parts.catalog.Catalog({"a": "o/a"}, 1)).stages("a", Image.new("RGB", (9, 9)))


PUBLIC = "8.8.8.8 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1"
PRIVATE = """127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1
    :: ::1 fe80::1 fd00::1 ff02::1 ::ffff:127.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: no"""


def test_public_addresses(parts, tmp_path):
    assert [address for address in PUBLIC.split() if not parts.uploads.is_public(address)] == []
    assert [address for address in PRIVATE.split() if parts.uploads.is_public(address)] == []
    for host in ("localhost", "[::1]", "2130706433", "0x7f.1"):  # other ways to write 127.0.0.1
        with pytest.raises(parts.uploads.Refused, match="not on the open internet|no such address"):
            asyncio.run(parts.uploads.fetch(f"http://{host}/a.png", tmp_path))


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
    with ThreadingHTTPServer(("127.0.0.1", 0), Redirects) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        port = web.server_port
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
        web.shutdown()
    assert Path(found).read_bytes() == bytes(900)
    assert Path(found).name == "900"


def test_header_and_requirements():
    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    pins = dict(line.split("==") for line in (SPACE.parent / "constraints.txt").read_text().split() if "==" in line)
    assert header["sdk_version"] == pins["gradio"], "the Space must run the tested version"
    assert len(header["short_description"]) <= 60
    # The requirements name every import. The package is not one: it is imported late, for networks that it ships.
    needed = {re.match(r"[\w-]+", line).group() for line in (SPACE / "requirements.txt").read_text().splitlines()}
    sources = [path.read_text(encoding="utf-8") for path in SPACE.glob("*.py")]
    imported = {name for text in sources for name in re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE)}
    packages = {"PIL": "pillow", **dict.fromkeys(("gradio_client", "httpx", "safehttpx", "starlette"), "gradio")}
    own = {path.stem for path in SPACE.glob("*.py")} | {"spaces", "unconceal"}
    assert {packages.get(name, name) for name in imported - own - set(sys.stdlib_module_names)} <= needed
    assert not re.search(r"^(import|from) unconceal", "\n".join(sources), re.MULTILINE)


def test_examples_are_generated():
    """They may be published because our program drew them."""
    drawn = {
        **{f"camouflage-{n}.jpg": ("camouflage", (480, 640), index) for n, index in ((1, 0), (2, 2), (3, 3))},
        **{f"ultrasound-{n}.jpg": ("ultrasound", (480, 640), index) for n, index in ((1, 1), (2, 2))},
        **{f"infrared-{n}.png": ("infrared", 256, index) for n, index in ((1, 2), (2, 3))},
        **{f"intricate-{n}.jpg": ("intricate", (720, 960), index) for n, index in ((1, 1), (2, 3))},
        **{f"polyp-{n}.jpg": ("polyp", (480, 640), index) for n, index in ((1, 1), (2, 10), (3, 16))},
        **{f"defect-{n}.jpg": ("defect", (480, 640), index) for n, index in ((1, 2), (2, 7), (3, 5))},
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
