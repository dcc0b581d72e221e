"""Pictures that clients send: as data URLs, or at addresses that the server's owner allows.

Nothing here trusts what it is given. Sizes are known before anything is decoded; an address is fetched only if it
begins with an allowed prefix, leads to a public address of the internet, and does not redirect.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import math
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from urllib.parse import SplitResult, unquote, urlsplit

from PIL import Image

from ..processing.image_processing_pil_lavit import to_rgb

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_FETCH_SECONDS = 10.0
_CHUNK = 2**16
_PORTS = {"http": 80, "https": 443}
# Ranges of IPv6 that carry addresses of IPv4, private ones included.
_CARRIERS = [ipaddress.ip_network(range) for range in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]


class PictureError(ValueError):
    """A picture cannot be used; the message says why."""


def parse_prefix(prefix: str) -> SplitResult:
    """Reads a prefix of addresses that may be fetched.

    Raises:
        ValueError: It has no scheme, no host, or more than a path.
    """
    wrong = f"{prefix!r} is no prefix of addresses: it must be like https://example.com/pictures/."
    parts = urlsplit(prefix)
    try:
        _ = parts.port
    except ValueError as error:  # there can be no such port
        raise ValueError(wrong) from error
    if parts.scheme not in _PORTS or not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(wrong)
    return parts


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and not of this machine or its networks."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif any(ip in network for network in _CARRIERS):
            return False
    return ip.is_global and not ip.is_multicast


class PictureReader:
    """Reads pictures.

    Args:
        max_bytes: Of an encoded picture.
        max_pixels: Of a picture.
        allowed_prefixes: Of addresses that may be fetched; none by default.
    """

    def __init__(self, max_bytes: int, max_pixels: int, allowed_prefixes: Sequence[str] = ()):
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._prefixes = [parse_prefix(prefix) for prefix in allowed_prefixes]

    def read(self, url: str, deadline: float = math.inf) -> Image.Image:
        """Reads a picture, as RGB and upright.

        Args:
            url: The picture as a data URL, or its address.
            deadline: When it is too late, of `time.monotonic`.

        Raises:
            PictureError: It is no picture, too large, at an address that is not allowed, or takes too long.
        """
        if url[:5].lower() == "data:":
            return self._decode(self._read_data_url(url))
        return self._decode(self._fetch(url, deadline))

    def _decode(self, data: bytes) -> Image.Image:
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > self._max_pixels:
                    raise PictureError(
                        f"A picture has {width} x {height} pixels; at most {self._max_pixels:,} are taken."
                    )
                return to_rgb(image)
        except Image.DecompressionBombError as error:
            raise PictureError(f"A picture has too many pixels; at most {self._max_pixels:,} are taken.") from error
        except Image.UnidentifiedImageError as error:
            raise PictureError(f"A picture is none of {', '.join(_FORMATS)}, or is damaged.") from error
        except PictureError:
            raise
        except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow raises about damaged files
            raise PictureError(f"A picture cannot be read: {error}") from error

    def _read_data_url(self, url: str) -> bytes:
        head, comma, text = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise PictureError("A data URL must be like data:image/png;base64,...")
        if len(text) * 3 // 4 > self._max_bytes + 2:
            raise self._too_large()
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise PictureError(f"A data URL does not hold base64: {error}.") from error

    def _too_large(self) -> PictureError:
        return PictureError(f"A picture is larger than {self._max_bytes:,} bytes.")

    def _fetch(self, url: str, deadline: float) -> bytes:
        parts = self._check_url(url)
        host, port = str(parts.hostname), parts.port or _PORTS[parts.scheme]
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        until = min(time.monotonic() + _FETCH_SECONDS, deadline)
        connection = _connect(parts.scheme, host, port, until)
        # The timeout of a socket begins anew with every byte; this one does not.
        alarm = threading.Timer(max(until - time.monotonic(), 0), connection.abort)
        alarm.daemon = True
        alarm.start()
        try:
            connection.request("GET", path, headers={"Accept-Encoding": "identity", "User-Agent": "lavit-hf"})
            response = connection.getresponse()
            if response.status != 200:  # a redirect would lead elsewhere
                raise PictureError(f"{_short(url)} answers with the status {response.status}.")
            data = b""
            while chunk := response.read1(_CHUNK):
                data += chunk
                if len(data) > self._max_bytes:
                    raise self._too_large()
            if connection.is_aborted:  # what was read looks like all of it
                raise TimeoutError
            return data
        except (OSError, http.client.HTTPException) as error:
            reason = "it takes too long" if connection.is_aborted or isinstance(error, TimeoutError) else error
            raise PictureError(f"{_short(url)} cannot be fetched: {reason}") from error
        finally:
            alarm.cancel()
            connection.close()

    def _check_url(self, url: str) -> SplitResult:
        refusal = PictureError(
            f"{_short(url)} is not fetched: send pictures as data:image/png;base64,..., or let the server's owner "
            "allow addresses with --allow-url-prefix."
        )
        if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
            raise refusal
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise refusal from None
        # Servers decode a path before they resolve its dots, some of them twice.
        path = unquote(unquote(parts.path))
        if "@" in parts.netloc or any(step in (".", "..") for step in path.replace("\\", "/").split("/")):
            raise refusal
        for prefix in self._prefixes:
            same_host = (parts.scheme, parts.hostname, port) == (prefix.scheme, prefix.hostname, prefix.port)
            folder = prefix.path.rstrip("/")
            if same_host and (parts.path == folder or parts.path.startswith(f"{folder}/")):
                return parts
        raise refusal


class _CheckedConnection(http.client.HTTPConnection):
    """A connection to one address that has been checked; a second look at the name could find another."""

    def __init__(self, host: str, port: int, address: tuple, context: ssl.SSLContext | None):
        super().__init__(host, port, timeout=_FETCH_SECONDS)
        self.is_aborted = False
        self._wire: socket.socket | None = None  # `sock` is let go of as soon as a response reads from it alone
        self._address = address
        self._context = context

    def connect(self) -> None:
        self.sock = socket.create_connection(self._address, timeout=self.timeout)
        if self._context:
            name = self.host
            self.sock = self._context.wrap_socket(self.sock, server_hostname=name, do_handshake_on_connect=False)
        self._wire = self.sock
        if self.is_aborted:
            raise TimeoutError
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.do_handshake()

    def abort(self) -> None:
        """Ends whatever another thread waits for here."""
        self.is_aborted = True
        if self._wire is not None:
            with suppress(OSError):  # closed already
                socket.socket.shutdown(self._wire, socket.SHUT_RDWR)  # below TLS, which is another thread's


def _connect(scheme: str, host: str, port: int, until: float) -> _CheckedConnection:
    addresses = _resolve(host, port, until)
    if not addresses or not all(is_public(str(address[0])) for address in addresses):
        raise PictureError(f"{host} is not an address of the public internet.")
    context = ssl.create_default_context() if scheme == "https" else None
    return _CheckedConnection(host, port, addresses[0][:2], context)


def _resolve(host: str, port: int, until: float) -> list[tuple]:
    """The addresses of a host. A name server may take longer than there is time, and nothing interrupts the wait."""
    found: Future[list[tuple]] = Future()

    def look_up() -> None:
        try:
            found.set_result([entry[4] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        return found.result(timeout=max(until - time.monotonic(), 0))
    except TimeoutError as error:  # before OSError, which it is, too
        raise PictureError(f"{host} cannot be found: it takes too long") from error
    except (OSError, UnicodeError) as error:
        raise PictureError(f"{host} cannot be found: {error}") from error


def _short(url: str) -> str:
    return url if len(url) <= 100 else f"{url[:100]}..."


__all__ = ["PictureError", "PictureReader", "is_public", "parse_prefix"]
