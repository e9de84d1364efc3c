"""What people send: files and addresses of pictures, read under limits. Anyone may call; nothing here trusts the caller."""

import asyncio
import ipaddress
import math
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
from PIL import Image, ImageFile, UnidentifiedImageError


# Every other decoder of Pillow stays shut: some run programs (EPS), and few know them. JPEG includes MPO.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
MAX_BYTES = 128 * 2**20
MAX_REDIRECTS = 5
NAT64 = ipaddress.ip_network("64:ff9b::/96")
SECONDS = 20  # for an address to answer, and again for all of its bytes


class Refused(gr.Error):
    """A picture that is not taken, with the reason in one line."""

    def __init__(self, message: str):
        super().__init__(message, title="Not taken", print_exception=False)


def limit_pillow(max_pixels: int):
    """Let no picture above `max_pixels` be opened anywhere in this process, gradio's own code included."""
    Image.MAX_IMAGE_PIXELS = max_pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    ImageFile.LOAD_TRUNCATED_IMAGES = False


def read_picture(path: str | Path) -> Image.Image:
    """Open and decode a picture, within the limit of `limit_pillow`.

    Raises:
        Refused: If it is none, is damaged or too large.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
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


def read_header(path: str | Path) -> str:
    """Return Pillow's name of the format of a picture that `read_picture` takes."""
    with Image.open(path, formats=FORMATS) as image:
        return image.format


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the open internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 6:
        # Addresses that lead to one of version 4: what counts is that.
        inner = (
            ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None)
        )
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


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
            client.stream("GET", url, headers={"User-Agent": "unconceal"}) as response,
        ):
            if response.has_redirect_location:
                url = urljoin(url, response.headers["Location"])
                if not is_http_url_like(url):
                    raise Refused("The address leads on to something that is no web address.")
                continue
            if response.status_code != httpx.codes.OK:
                raise Refused(f"The address answered with {response.status_code} instead of a picture.")
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
            async for chunk in response.aiter_bytes():
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
    """Of components that take files: an address in place of an upload is fetched by `fetch`, whose size has a limit."""

    shown_as: str

    def get_block_name(self) -> str:
        """Tell the browser which of gradio's own components this is."""
        return self.shown_as

    get_block_class = get_block_name

    async def async_move_resource_to_block_cache(self, url_or_file_path):
        if is_http_url_like(str(url_or_file_path or "")):
            url_or_file_path = await fetch(str(url_or_file_path), self.GRADIO_CACHE)
        return await super().async_move_resource_to_block_cache(url_or_file_path)


class PictureInput(_Guarded, gr.Image):
    """gradio's picture input that hands on the file as it came: no decoding before the limits are known."""

    shown_as = "image"

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
    if not path or not Path(path).resolve().is_relative_to(upload_folder().resolve()):
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
    "limit_pillow",
    "preview_size",
    "read_header",
    "read_picture",
    "upload_folder",
]
