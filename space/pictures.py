"""What people send: files and addresses of pictures, read under limits. Anyone may call; nothing here trusts the caller."""

import asyncio
import contextlib
import ipaddress
import math
import os
import secrets
import socket
import warnings
from pathlib import Path
from urllib.parse import urljoin

import gradio as gr
import httpx
import safehttpx
from gradio import utils
from gradio_client.utils import is_http_url_like, strip_invalid_filename_characters
from PIL import Image, UnidentifiedImageError


# Every other decoder of Pillow stays shut: some run programs (EPS), and few know them. JPEG includes MPO.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
MAX_BYTES = 128 * 2**20
MAX_REDIRECTS = 5
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")
HEADERS = {"User-Agent": "unconceal", "Accept-Encoding": "identity"}
SECONDS = 10  # for an address to answer, and again for all of its bytes


class Refused(gr.Error):
    """A picture that is not taken, with the reason in one line."""

    def __init__(self, message: str):
        super().__init__(message, title="Not taken", print_exception=False)


def limit_pillow(max_pixels: int):
    """Let no picture above `max_pixels` be opened anywhere in this process, gradio's own code included."""
    Image.MAX_IMAGE_PIXELS = max_pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def read_picture(path: str | Path) -> Image.Image:
    """Open and decode a picture, within the limit of `limit_pillow`.

    Raises:
        Refused: If it is none, is damaged or too large.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            # Once more: what other threads do with warnings can silence Pillow's.
            if math.prod(image.size) > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        raise Refused(f"This picture has more than {limit:g} megapixels. Make it smaller and try again.") from None
    except UnidentifiedImageError:
        raise Refused("This is no picture that can be read. JPEG, PNG, WebP, TIFF and most others work.") from None
    except FileNotFoundError:
        raise Refused("This picture is no longer here: uploads are deleted soon. Add it again.") from None
    # Pillow's decoders raise nearly any class on damaged files: SyntaxError, struct.error, IndexError, ...
    except Exception:
        raise Refused("This picture is damaged and cannot be read to its end.") from None


def read_header(path: str | Path) -> tuple[str, int]:
    """Return Pillow's name of the format and the number of pixels of a picture; of anything else "" and 0."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.format, math.prod(image.size)
    except Exception:  # see `read_picture`
        return "", 0


def hold(paths: list[str]):
    """Let the sweeping of uploads begin to count anew, since a request has begun to use them."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.utime(path)


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the open internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 6:
        # Addresses that lead to one of version 4: what counts is that.
        inner = ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip.ipv4_mapped)
        if inner is not None:
            return is_public(str(inner))
        if ip not in GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


# For what gradio fetches by itself, too: its own rule lets shared address space (100.64.0.0/10) pass.
safehttpx.is_public_ip = is_public


async def fetch(url: str, folder: str | Path) -> str:
    """Download a picture from the open internet into a folder and return its path.

    Every hop of a redirect is resolved, checked and then connected to by that very IP address, so that a name cannot
    point elsewhere a moment later.

    Raises:
        Refused: If the address is not http(s), not public, does not answer in time with a file, or the file is too large.
    """
    url = url.strip()
    if not is_http_url_like(url):
        raise Refused("Expected an address that begins with http:// or https://.")
    try:
        async with asyncio.timeout(2 * SECONDS):
            return await _fetch(url, Path(folder))
    except (TimeoutError, httpx.TimeoutException):
        raise Refused("The address did not answer in time.") from None
    except Refused:
        raise
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        raise Refused("The address could not be reached.") from None


async def _fetch(url: str, folder: Path) -> str:
    for _ in range(MAX_REDIRECTS + 1):
        host = httpx.URL(url).host
        transport = safehttpx.AsyncSecureTransport(await _public_address(host))
        async with (
            httpx.AsyncClient(transport=transport, timeout=SECONDS, trust_env=False) as client,
            client.stream("GET", url, headers=HEADERS) as response,
        ):
            if response.has_redirect_location:
                url = urljoin(url, response.headers["Location"])
                if not is_http_url_like(url):
                    raise Refused("The address leads on to something that is no web address.")
                continue
            if response.status_code != httpx.codes.OK:
                raise Refused(f"The address answered with {response.status_code} instead of a picture.")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                # A few bytes could unfold into any number.
                raise Refused("The address answered with compressed bytes, which are not taken.")
            return await _save(response, folder / secrets.token_hex(16) / _file_name(url))
    raise Refused(f"The address leads on more than {MAX_REDIRECTS} times.")


async def _public_address(host: str) -> str:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Refused("There is no such address.") from None
    addresses = [entry[4][0] for entry in found]
    # One private address among public ones is how a name is made to lead inside.
    if not addresses or not all(map(is_public, addresses)):
        raise Refused("This address is not on the open internet; it is not fetched.")
    return addresses[0]


async def _save(response: httpx.Response, path: Path) -> str:
    path.parent.mkdir(parents=True)
    size = 0
    try:
        with path.open("wb") as file:
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size > MAX_BYTES:
                    raise Refused(f"The file behind this address has more than {MAX_BYTES // 2**20} MB.")
                file.write(chunk)
    except BaseException:
        path.unlink(missing_ok=True)
        path.parent.rmdir()
        raise
    return str(path)


def _file_name(url: str) -> str:
    name = strip_invalid_filename_characters(Path(httpx.URL(url).path).name or "picture")
    return "picture" if name == ".." else name


class _Guarded:
    """Of components that take files: only such as were uploaded, or where it says so, an address, which `fetch` gets."""

    takes_addresses = False
    shown_as: str

    def get_block_name(self) -> str:
        """Tell the browser which of gradio's own components this is."""
        return self.shown_as

    get_block_class = get_block_name

    async def async_move_resource_to_block_cache(self, url_or_file_path):
        """Return the path of what a visitor names or a request gives."""
        given = str(url_or_file_path or "")
        if is_http_url_like(given):
            if not self.takes_addresses:
                raise Refused("Addresses are taken one by one; many pictures at once must be files.")
            url_or_file_path = await fetch(given, self.GRADIO_CACHE)
        return await super().async_move_resource_to_block_cache(url_or_file_path)


class PictureInput(_Guarded, gr.Image):
    """gradio's picture input that hands on the file as it came: no decoding before the limits are known."""

    shown_as = "image"
    takes_addresses = True

    def preprocess(self, payload) -> str | None:
        if payload is None:
            return None
        return _uploaded(payload.path)


class PictureFiles(_Guarded, gr.File):
    """gradio's input of many files, handed on likewise."""

    shown_as = "file"

    def preprocess(self, payload) -> list[str]:
        return [_uploaded(file.path) for file in (payload.root if payload else ())]


class Download(_Guarded, gr.DownloadButton):
    """gradio's download, which can also be asked for its file without leaving another on disk."""

    shown_as = "downloadbutton"

    def preprocess(self, payload) -> str | None:
        return _uploaded(payload.path) if payload else None


def _uploaded(path: str | None) -> str:
    # A picture as text has no path; gradio's own check passes over files that a caller describes in an unusual way.
    folder = upload_folder().resolve()
    if not path or folder not in Path(path).resolve().parents:
        raise Refused("Expected an uploaded file or an address.")
    return path


def preview_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return (width, height) shrunk so that neither passes `side`."""
    scale = min(1, side / max(size))
    return tuple(max(1, math.floor(length * scale + 0.5)) for length in size)


def upload_folder() -> Path:
    """Return where gradio keeps uploads and results until they are deleted."""
    return Path(utils.get_upload_folder())


# gradio writes a stub beside every module that makes a component.
Path(__file__).with_suffix(".pyi").unlink(missing_ok=True)

__all__ = [
    "Download",
    "PictureFiles",
    "PictureInput",
    "Refused",
    "fetch",
    "hold",
    "limit_pillow",
    "preview_size",
    "read_header",
    "read_picture",
    "upload_folder",
]
