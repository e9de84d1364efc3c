"""What keeps one visitor from harming the others: limits on requests, closed routes, and a folder that is swept."""

import os
import re
import threading
import time
from pathlib import Path

from pictures import MAX_BYTES, upload_folder
from starlette.responses import PlainTextResponse


MAX_UPLOAD_BYTES = 8 * MAX_BYTES  # of one request, which may bring many files
MAX_MESSAGE_BYTES = 2**20  # of any other request
MAX_FOLDER_BYTES = 8 * 2**30
# Of gradio's, that nothing here needs: two that fetch any public address for anybody, and one that writes what a page shows.
CLOSED = re.compile(r"/(file=https?:|proxy=|deep_link)", re.IGNORECASE)


class Guard:
    """ASGI middleware that answers what is closed or too large itself."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        uploads = scope["path"].endswith("/upload")
        limit = MAX_UPLOAD_BYTES if uploads else MAX_MESSAGE_BYTES
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        refusal = None
        if CLOSED.search(scope["path"]):
            refusal = PlainTextResponse("This is closed here.", 403)
        elif not stated.isdigit() or int(stated) > limit:
            refusal = PlainTextResponse(f"A request may bring up to {limit >> 20} MB.", 413)
        elif uploads and used_bytes(upload_folder()) > MAX_FOLDER_BYTES:
            refusal = PlainTextResponse("There is no room at the moment. Try again in a quarter of an hour.", 503)
        if refusal:
            await refusal(scope, receive, send)
            return

        size = 0

        async def counted():
            # A body that comes in parts states no length.
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message if size <= limit else {"type": "http.disconnect"}

        await self.app(scope, counted, send)


def used_bytes(folder: Path) -> int:
    """Return how much lies in a folder."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(directory) / name).lstat().st_size
            except FileNotFoundError:  # swept meanwhile
                continue
    return total


def keep_swept(folder: Path, kept_seconds: float):
    """Start a thread that deletes what has lain in a folder for so long, whoever put it there.

    gradio's own sweep passes over files that it did not write down, such as of uploads that were broken off.
    """

    def sweep_always():
        while True:
            time.sleep(min(30, kept_seconds / 2))
            sweep(folder, kept_seconds)

    threading.Thread(target=sweep_always, daemon=True, name="sweep").start()


def sweep(folder: Path, kept_seconds: float):
    """Delete the files of a folder that did not change for so long, and then its empty folders."""
    limit = time.time() - kept_seconds
    for directory, _, names in os.walk(folder, topdown=False):
        for path in (*(Path(directory) / name for name in names), Path(directory)):
            try:
                # Not the time of content, which a copy has from its original.
                if path == folder or path.lstat().st_ctime > limit:
                    continue
                if path.is_dir():
                    path.rmdir()  # which fails for one that is not empty
                else:
                    path.unlink()
            except OSError:  # gone or in use: next time
                continue
