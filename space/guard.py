"""Protect visitors from each other: request limits, closed routes, automatic deletion."""

import os
import re
import threading
import time
from pathlib import Path

from starlette.responses import PlainTextResponse
from uploads import MAX_BYTES, upload_folder


MAX_UPLOAD_BYTES = 8 * MAX_BYTES  # of one request, which may hold many files
MAX_MESSAGE_BYTES = 2**20  # of any other request
MAX_FOLDER_BYTES = 8 * 2**30
# Routes of gradio that the demo does not need. Two fetch public addresses for anyone; one saves the state of a page.
CLOSED = re.compile(r"/(file=https?:|proxy=|deep_link)", re.IGNORECASE)


class Guard:
    """ASGI middleware that refuses closed routes and large requests."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        uploads = scope["path"].endswith("/upload")
        limit = MAX_UPLOAD_BYTES if uploads else MAX_MESSAGE_BYTES
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        refusal = None
        if CLOSED.search(scope["path"]):
            refusal = PlainTextResponse("This route is closed.", 403)
        elif not stated.isdigit() or int(stated) > limit:
            refusal = PlainTextResponse(f"The request is too large. The limit is {limit >> 20} MB.", 413)
        elif uploads and used_bytes(upload_folder()) > MAX_FOLDER_BYTES:
            refusal = PlainTextResponse("The disk is full right now. Try again in a quarter of an hour.", 503)
        if refusal:
            await refusal(scope, receive, send)
            return

        size = 0

        async def counted():
            # A chunked body does not state its length.
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message if size <= limit else {"type": "http.disconnect"}

        await self.app(scope, counted, send)


def used_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(directory) / name).lstat().st_size
            except FileNotFoundError:  # deleted meanwhile
                continue
    return total


def keep_swept(folder: Path, kept_seconds: float):
    """Start a thread that deletes files older than `kept_seconds`.

    gradio's own sweep misses files it has no record of, such as interrupted uploads.
    """

    def sweep_always():
        while True:
            time.sleep(min(30, kept_seconds / 2))
            sweep(folder, kept_seconds)

    threading.Thread(target=sweep_always, daemon=True, name="sweep").start()


def sweep(folder: Path, kept_seconds: float):
    """Delete files unchanged for `kept_seconds`, then empty folders."""
    limit = time.time() - kept_seconds
    for directory, _, names in os.walk(folder, topdown=False):
        for path in (*(Path(directory) / name for name in names), Path(directory)):
            try:
                # Not the modification time, which a copy takes from its original.
                if path == folder or path.lstat().st_ctime > limit:
                    continue
                if path.is_dir():
                    path.rmdir()  # fails if not empty
                else:
                    path.unlink()
            except OSError:  # gone or in use: next time
                continue
