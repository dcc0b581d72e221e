"""Pictures from clients: what is taken, and what is never fetched."""

import base64
import http.server
import io
import math
import threading
import time
from collections.abc import Iterator

import pytest
from PIL import Image

from lavit_hf.serving import pictures
from lavit_hf.serving.pictures import PictureError, PictureReader, is_public, parse_prefix

from .conftest import data_url

PICTURE = Image.new("RGB", (20, 10), (200, 30, 40))


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """A server on loopback that has a picture, and answers that are none."""
    file = io.BytesIO()
    PICTURE.save(file, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/a/slow":  # a byte now and then, which is no silence that a socket would notice
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
                for _ in range(200):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
                self.wfile.write(b"\r\n\r\n" + file.getvalue())
                return
            self.send_response({"/a/moved": 302, "/a/none": 404}.get(path, 200))
            if path == "/a/moved":
                self.send_header("Location", "/a/picture.png")
            self.end_headers()
            self.wfile.write(b"x" * 10**6 if path == "/a/large" else file.getvalue())

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def reader(*prefixes: str) -> PictureReader:
    return PictureReader(max_bytes=100_000, max_pixels=10_000, allowed_prefixes=prefixes)


@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_data_urls(picture_format: str) -> None:
    found = reader().read(data_url(PICTURE, picture_format))
    assert (found.mode, found.size) == ("RGB", (20, 10))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,AAAA", "none of PNG"),
        ("data:image/png;base64,****", "does not hold base64"),
        ("data:image/png,abc", "must be like"),
        ("data:image/png;base64", "must be like"),
        ("data:image/png;base64,", "none of PNG"),
        (f"data:image/png;base64,{'A' * 200_000}", "larger than 100,000 bytes"),
        (data_url(Image.new("1", (200, 200))), "at most 10,000"),
        (data_url(Image.new("1", (30000, 30000)), "TIFF"), "none of PNG|larger than"),
        (data_url(PICTURE)[:-40], "cannot be read|Cannot decode|base64"),
    ],
)
def test_what_is_no_picture(url: str, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        reader().read(url)


def test_formats_that_read_files_or_run_programs_are_not_opened() -> None:
    script = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()
    with pytest.raises(PictureError, match="none of PNG"):
        reader().read(f"data:image/png;base64,{script}")


def test_allowed_addresses(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "is_public", lambda address: True)
    allowed = reader(f"{web}/a")
    assert allowed.read(f"{web}/a/picture.png?size=1").getpixel((0, 0)) == (200, 30, 40)
    for path, message in [("moved", "status 302"), ("none", "status 404"), ("large", "larger than")]:
        with pytest.raises(PictureError, match=message):
            allowed.read(f"{web}/a/{path}")


@pytest.mark.parametrize(("seconds", "deadline"), [(0.3, math.inf), (60.0, 0.0)])
def test_slow_addresses(web: str, monkeypatch: pytest.MonkeyPatch, seconds: float, deadline: float) -> None:
    """Regression: the limit began anew with every byte."""
    monkeypatch.setattr(pictures, "is_public", lambda address: True)
    monkeypatch.setattr(pictures, "_FETCH_SECONDS", seconds)
    with pytest.raises(PictureError, match="it takes too long"):
        reader(f"{web}/a").read(f"{web}/a/slow", deadline)


@pytest.mark.parametrize(
    "path",
    [
        "/b/x",
        "/ab/x",
        "/a/../b",
        "/a/%2e%2e/b",
        "/a/%252e%252e/b",
        "/a/..%2fb",
        "/a/..%5cb",
        "/a/x y",
        "/a/x\ny",
        "/a\\x",
    ],
)
def test_other_paths_are_not_fetched(web: str, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(pictures, "is_public", lambda address: True)
    with pytest.raises(PictureError, match="--allow-url-prefix"):
        reader(f"{web}/a").read(web + path)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://example.com/a/x.png",
        "http://example.com/a/x.png",
        "https://example.com:444/a/x.png",
        "https://example.com.evil.org/a/x.png",
        "https://example.com@evil.org/a/x.png",
        "https://evil.org/https://example.com/a/x.png",
        "https://example.com:x/a/",
        "https://exämple.com/a/x.png",
    ],
)
def test_other_addresses_are_not_fetched(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures.socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("it asked for a name"))
    with pytest.raises(PictureError, match="--allow-url-prefix"):
        reader("https://example.com/a/").read(url)


def test_names_that_lead_home_are_not_fetched(web: str) -> None:
    with pytest.raises(PictureError, match="not an address of the public internet"):
        reader(f"{web}/a").read(f"{web}/a/picture.png")
    named = web.replace("127.0.0.1", "localhost")
    with pytest.raises(PictureError, match="not an address of the public internet"):
        reader(named).read(f"{named}/picture.png")


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, is_over = threading.Event(), threading.Event()

    def look_up(*args: object, **kwargs: object) -> list:
        asked.set()
        is_over.wait(60)
        return []

    monkeypatch.setattr(pictures.socket, "getaddrinfo", look_up)
    try:
        with pytest.raises(PictureError, match=r"example\.com cannot be found: it takes too long"):
            reader("https://example.com/a/").read("https://example.com/a/x.png", time.monotonic() + 0.2)
        assert asked.is_set()
    finally:
        is_over.set()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        *((address, False) for address in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254")),
        *((address, False) for address in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "198.18.0.1")),
        *((address, False) for address in ("::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1")),
        *((address, False) for address in ("64:ff9b::a00:1", "2002:a00:1::", "2001:0:a00:1::")),
    ],
)
def test_public_addresses(address: str, expected: bool) -> None:
    assert is_public(address) == expected


@pytest.mark.parametrize(
    "prefix", ["", "example.com", "file:///a", "https://", "https://a@b.c/", "https://a.b/?x=1", "https://a.b:99999/"]
)
def test_prefixes_that_are_none(prefix: str) -> None:
    with pytest.raises(ValueError, match="no prefix"):
        parse_prefix(prefix)
