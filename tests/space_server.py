"""Fixtures for the web demo: one server in its own process, which all tests ask."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from save_tiny_models import save_tiny_models


SPACE = Path(__file__).parents[1] / "space"
NETWORKS = {"camouflaged": "run", "lesion": "srs", "cut-out": "opds"}
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
        folder: Its working folder, with its log and its temporary files.
    """

    url: str
    folder: Path

    def client(self):
        import gradio_client

        downloads = self.folder / "downloads"
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

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def uploads(self) -> Path:
        (folder,) = (self.folder / "temporary").glob("unconceal-space-*")
        return folder

    def files(self) -> set[Path]:
        """Return its temporary files."""
        return {path for path in (self.folder / "temporary").rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))[0].parent


@pytest.fixture(scope="session")
def server(models, tmp_path_factory):
    """A demo with a lent GPU and one broken network."""
    folder = tmp_path_factory.mktemp("server")
    for name, file, text in (("broken", "config.json", "{}"), ("lent", "spaces.py", LENDER)):
        (folder / name).mkdir()
        (folder / name / file).write_text(text)
    (folder / "temporary").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pairs = [*(f"{name}={models / kind}" for name, kind in NETWORKS.items()), f"broken={folder / 'broken'}"]
    command = [sys.executable, str(SPACE / "app.py"), "--port", str(port), "--model", *pairs]
    variables = {"TMPDIR": folder / "temporary", "HF_HOME": folder / "hub", "PYTHONPATH": folder / "lent"}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **{name: str(path) for name, path in variables.items()}}
    server, running = Server(f"http://127.0.0.1:{port}", folder), False
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        started = time.monotonic()
        while not running and process.poll() is None and time.monotonic() < started + PATIENCE:
            with contextlib.suppress(httpx.HTTPError):
                running = server.get("").is_success
            time.sleep(0.1)
        assert running, server.log()
        yield server
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
        assert server.files() == set(), "uploads or results outlive the process"
    finally:
        process.kill()
        process.wait()
