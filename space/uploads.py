"""Read uploaded files and web addresses under limits. Never trust the caller."""

import asyncio
import contextlib
import ipaddress
import math
import os
import secrets
import shutil
import socket
import warnings
from pathlib import Path
from urllib.parse import urljoin

import gradio as gr
import httpx
import safehttpx
from gradio import utils
from gradio.data_classes import ListFiles
from gradio_client.utils import is_http_url_like, strip_invalid_filename_characters
from PIL import Image, UnidentifiedImageError


# All other decoders of Pillow stay closed: some run programs (EPS), and most are rarely used. JPEG includes MPO.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
MAX_BYTES = 128 * 2**20
MAX_REDIRECTS = 5
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")
HEADERS = {"User-Agent": "unconceal", "Accept-Encoding": "identity"}
SECONDS = 10  # to connect and for each read; a whole download may take twice as long


class Refused(gr.Error):
    """A refused request, with the reason in one line."""

    def __init__(self, message: str):
        super().__init__(message, title="Not accepted", print_exception=False)


def limit_pillow(max_pixels: int):
    """Forbid images above `max_pixels` in this process, including gradio's own code."""
    Image.MAX_IMAGE_PIXELS = max_pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def read_image(path: str | Path) -> Image.Image:
    """Open and decode an image within the limit of `limit_pillow`.

    Raises:
        Refused: If the file is not an image, is damaged or is too large.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            # Check again: another thread that changes warning filters can silence Pillow's warning.
            if math.prod(image.size) > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        raise Refused(f"This image has more than {limit:g} megapixels. Make it smaller and try again.") from error
    except UnidentifiedImageError as error:
        raise Refused("This file is not an image we can read. Use JPEG, PNG, WebP, TIFF or another format.") from error
    except FileNotFoundError as error:
        raise Refused("This image was deleted, as all uploads are after a while. Upload it again.") from error
    # Pillow's decoders raise nearly any class on damaged files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise Refused("This image is damaged and cannot be read. Try another file.") from error


def read_header(path: str | Path) -> tuple[str, int]:
    """Return format and number of pixels, or "" and 0 if unreadable."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.format, math.prod(image.size)
    except Exception:  # see `read_image`
        return "", 0


def keep_longer(paths: list[str]):
    """Restart the time after which uploads are deleted."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.utime(path)


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the open internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 6:
        # Some addresses wrap one of version 4. Judge that one.
        inner = ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip.ipv4_mapped)
        if inner is not None:
            return is_public(str(inner))
        if ip not in GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


# Also for what gradio itself fetches: its own rule lets shared address space (100.64.0.0/10) pass.
safehttpx.is_public_ip = is_public


async def fetch(url: str, folder: str | Path) -> str:
    """Download an image from the open internet and return its path.

    Every redirect is resolved and checked, and the connection uses the checked IP address. So a host name cannot point
    elsewhere a moment later.

    Raises:
        Refused: If the address is not http(s) or not public, does not answer in time, or returns too large a file.
    """
    url = url.strip()
    if not is_http_url_like(url):
        raise Refused("The address must begin with http:// or https://.")
    try:
        async with asyncio.timeout(2 * SECONDS):
            return await _fetch(url, Path(folder))
    except (TimeoutError, httpx.TimeoutException) as error:
        raise Refused("The address did not answer in time.") from error
    except Refused:
        raise
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise Refused("The address could not be reached.") from error


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
                    raise Refused("The address redirects to something other than a web address.")
                continue
            if response.status_code != httpx.codes.OK:
                raise Refused(f"The address answered with status {response.status_code} instead of an image.")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                # A few bytes could expand to any size.
                raise Refused("The address answered with compressed data, which is not accepted.")
            return await _save(response, folder / secrets.token_hex(16) / _file_name(url))
    raise Refused(f"The address redirects more than {MAX_REDIRECTS} times.")


async def _public_address(host: str) -> str:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Refused("There is no such address.") from error
    addresses = [entry[4][0] for entry in found]
    # A private address among public ones is a trick to reach the inside.
    if not addresses or not all(map(is_public, addresses)):
        raise Refused("This address is not on the open internet, so it is not fetched.")
    return addresses[0]


async def _save(response: httpx.Response, path: Path) -> str:
    path.parent.mkdir(parents=True)
    size = 0
    try:
        with path.open("wb") as file:
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size > MAX_BYTES:
                    raise Refused(f"The file at this address is larger than {MAX_BYTES // 2**20} MB.")
                file.write(chunk)
    except BaseException:
        shutil.rmtree(path.parent)
        raise
    return str(path)


def _file_name(url: str) -> str:
    name = strip_invalid_filename_characters(Path(httpx.URL(url).path).name or "image")
    return "image" if name == ".." else name


class _Guarded:
    """Accept only uploaded files and, where allowed, addresses fetched by `fetch`.

    A function gets their paths. gradio decodes nothing, so limits are checked first.
    """

    takes_addresses = False
    shown_as: str

    def get_block_name(self) -> str:
        """Name the gradio component that the browser shows."""
        return self.shown_as

    get_block_class = get_block_name

    async def async_move_resource_to_block_cache(self, url_or_file_path):
        """Return the path of a file that a request names."""
        given = str(url_or_file_path or "")
        if is_http_url_like(given):
            if not self.takes_addresses:
                raise Refused("A batch accepts files only, no addresses.")
            url_or_file_path = await fetch(given, self.GRADIO_CACHE)
        return await super().async_move_resource_to_block_cache(url_or_file_path)

    def preprocess(self, payload) -> str | list[str] | None:
        """Return the path of an upload, or the paths of many."""
        if not payload:
            return None
        if isinstance(payload, ListFiles):
            return [self.preprocess(file) for file in payload.root]
        # Data URLs have no path, and gradio's own check misses files that a caller describes in an unusual way.
        if not payload.path or upload_folder().resolve() not in Path(payload.path).resolve().parents:
            raise Refused("Expected an uploaded file or a web address.")
        return payload.path


class ImageInput(_Guarded, gr.Image):
    """Input of one image."""

    shown_as = "image"
    takes_addresses = True


class ImageFiles(_Guarded, gr.File):
    """Input of many images."""

    shown_as = "file"


class Download(_Guarded, gr.DownloadButton):
    """Download button whose file can be an input without another copy."""

    shown_as = "downloadbutton"


def upload_folder() -> Path:
    """Return where gradio keeps uploads and results until they are deleted."""
    return Path(utils.get_upload_folder())


# gradio writes a stub next to every module that defines a component.
Path(__file__).with_suffix(".pyi").unlink(missing_ok=True)
