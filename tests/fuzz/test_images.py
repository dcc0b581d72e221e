"""Images in all formats, modes, types and kinds of damage: the right pixels, or a clear error.

A case paints a picture, encodes it in a way that loses nothing, and expects the pixels that the picture itself gives.
"""

import base64
import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from fuzz.runner import CLEAR, attempt, blocks, check_all, describe, seeded_rng
from lavit_hf import LavitImageProcessorPil

PROCESSOR = LavitImageProcessorPil(size={"height": 28, "width": 28})
# Floats and integers of 16 bits are rounded to 8 bits, before or after resizing.
ROUNDING = 1.5 / 255 / 0.26
NAMES = "image|picture|pixel|array|tensor|dtype|base64|NaN"
ORIENTATION = 0x0112
MB = 2**20


def paint(rng: random.Random, grey: bool = False) -> np.ndarray:
    """A picture [H, W, 3], or [H, W] in grey: noise, a gradient, or one color, of any shape."""
    sides = [rng.choice([1, 2, 3, 4, 5, 28, rng.randint(6, 90), rng.randint(6, 90)]) for _ in range(2)]
    if rng.random() < 0.05:
        sides[rng.randrange(2)] = rng.randint(200, 900)
    noise = np.random.default_rng(rng.randrange(2**32))
    shape = tuple(sides) if grey else (*sides, 3)
    kind = rng.randrange(3)
    if kind == 0:
        return noise.integers(0, 256, shape, dtype=np.uint8)
    if kind == 1:
        ramp = np.linspace(0, 255, sides[0] * sides[1]).reshape(sides)
        return np.ascontiguousarray((ramp if grey else np.stack([ramp, 255 - ramp, ramp], -1)).astype(np.uint8))
    return np.full(shape, noise.integers(0, 256, () if grey else 3), np.uint8)


def in_color(picture: np.ndarray) -> np.ndarray:
    return np.stack([picture] * 3, -1) if picture.ndim == 2 else picture


# Modes of PIL: an image and the picture that it shows


def mode_rgb(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    picture = paint(rng)
    return Image.fromarray(picture), picture


def mode_grey(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    picture = paint(rng, grey=True)
    return Image.fromarray(picture), picture


def mode_bits(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    picture = np.where(paint(rng, grey=True) > 127, 255, 0).astype(np.uint8)
    return Image.fromarray(picture).convert("1"), picture


def mode_palette(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    colors = np.frombuffer(rng.randbytes(3 * rng.randint(2, 256)), np.uint8).reshape(-1, 3)
    index = (paint(rng, grey=True).astype(int) % len(colors)).astype(np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colors.tobytes())
    return image, colors[index]


def mode_alpha(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    """Transparent parts show white."""
    image, picture = rng.choice([mode_rgb, mode_grey])(rng)
    is_opaque = np.random.default_rng(rng.randrange(2**32)).random(picture.shape[:2]) < rng.choice([0, 0.5, 1])
    image.putalpha(Image.fromarray(np.where(is_opaque, 255, 0).astype(np.uint8)))
    return image, np.where(is_opaque[..., None], in_color(picture), 255).astype(np.uint8)


def mode_cmyk(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    image, picture = mode_rgb(rng)
    return image.convert("CMYK"), picture


def mode_16_bits(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    picture = paint(rng, grey=True)
    return Image.fromarray(picture.astype(np.uint16) * 257), picture


def mode_integers(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    picture = paint(rng, grey=True)
    scale = 257 if picture.max() > 1 and rng.random() < 0.5 else 1
    return Image.fromarray(picture.astype(np.int32) * scale), picture


def mode_floats(rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    picture = paint(rng, grey=True)
    scale = 255 if rng.random() < 0.5 else 1
    if picture.max() <= 1 and scale == 1:
        picture = picture | 2  # floats up to 1 are shares
    return Image.fromarray(picture.astype(np.float32) / scale), picture


MODES = [mode_rgb, mode_grey, mode_bits, mode_palette, mode_alpha, mode_cmyk, mode_16_bits, mode_integers, mode_floats]
FORMATS: dict[str, tuple[list[Callable], dict[str, Any]]] = {
    "PNG": ([mode_rgb, mode_grey, mode_bits, mode_palette, mode_alpha, mode_16_bits], {}),
    "BMP": ([mode_rgb, mode_grey, mode_bits, mode_palette], {}),
    "GIF": ([mode_grey, mode_bits, mode_palette], {}),
    "TIFF": ([mode_rgb, mode_grey, mode_bits, mode_palette, mode_cmyk, mode_16_bits, mode_floats], {}),
    "WEBP": ([mode_rgb, mode_grey], {"lossless": True}),
    "PPM": ([mode_rgb, mode_grey, mode_bits], {}),
    "TGA": ([mode_rgb, mode_grey, mode_palette], {}),
    "PCX": ([mode_rgb, mode_grey, mode_palette], {}),
    "JPEG2000": ([mode_rgb, mode_grey], {"irreversible": False}),
}
if int(PIL.__version__.partition(".")[0]) < 13:
    del FORMATS["PCX"]  # Pillow itself wrote pictures of one or three columns so that they could not be read
# What undoes each orientation of EXIF.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def encode_file(rng: random.Random) -> tuple[bytes, np.ndarray]:
    """A file, and the picture that it shows."""
    name = rng.choice(list(FORMATS))
    modes, options = FORMATS[name]
    image, picture = rng.choice(modes)(rng)
    if name == "JPEG2000" and min(image.size) < 32:
        name, options = "PNG", {}
    if name == "TIFF" and image.mode in ("RGB", "L") and rng.random() < 0.5:
        options = {"compression": rng.choice(["tiff_lzw", "tiff_deflate", "packbits"])}
    if name in ("GIF", "PNG", "TIFF", "WEBP") and image.mode in ("RGB", "L", "P") and rng.random() < 0.2:
        others = [image.copy().transpose(Image.Transpose.ROTATE_180) for _ in range(rng.randint(1, 4))]
        options = {**options, "save_all": True, "append_images": others}
    elif name in ("PNG", "TIFF", "WEBP") and rng.random() < 0.3:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation = rng.choice([*UPRIGHT, 0, 1, 9, 65535])
        options = {**options, "exif": exif}
        if orientation in UPRIGHT:
            picture = np.asarray(Image.fromarray(picture).transpose(UPRIGHT[orientation]))
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue(), picture


def encode_jpeg(rng: random.Random) -> tuple[bytes, np.ndarray]:
    """A JPEG, and what PIL reads of it."""
    image, _ = rng.choice([mode_rgb, mode_grey, mode_cmyk])(rng)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=rng.randint(1, 95), progressive=rng.random() < 0.5)
    return file.getvalue(), np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))


def carry(rng: random.Random, content: bytes, folder: Path) -> Any:
    """One of the ways to hand over a file."""
    kind = rng.randrange(7)
    if kind < 3:
        path = folder / rng.choice(["a.png", "b", "c d.jpg", "\u732b.webp", "e.TXT"])
        path.write_bytes(content)
        return [path, str(path), Image.open(path)][kind]
    if kind == 3:
        return content
    if kind == 4:
        return "data:image/png;base64," + base64.b64encode(content).decode()
    if kind == 5 and len(content) > 64:
        return base64.b64encode(content).decode()
    return Image.open(io.BytesIO(content))


def encode_array(rng: random.Random) -> tuple[Any, np.ndarray]:
    """An array or tensor, and the picture that it shows."""
    dtype = rng.choice(["uint8", "uint16", "int16", "int32", "int64", "float32", "float64", "float16", "bool"])
    grey = dtype != "bool" and rng.random() < 0.3
    picture = paint(rng, grey)
    while not grey and (picture.shape[0] in (1, 3, 4) or picture.shape[1] in (1, 3, 4)):
        picture = paint(rng)  # where the channels are is a guess then
    array: Any = picture
    if rng.random() < 0.3 and not grey and dtype != "bool":
        alpha = np.where(picture[..., :1] > 127, 255, 0).astype(np.uint8)
        array = np.concatenate([picture, alpha], -1)
        picture = np.where(alpha > 0, picture, 255).astype(np.uint8)
    if dtype == "bool":
        array = picture > 127
        picture = np.where(array, 255, 0).astype(np.uint8)
    elif dtype == "uint16":
        array = array.astype(np.uint16) * 257
    else:
        if dtype.startswith("float") and array.max() <= 1:
            array, picture = array | 2, picture | 2
        array = array.astype(dtype)
    if array.ndim == 3 and rng.random() < 0.5:
        array = np.moveaxis(array, -1, 0)
    if rng.random() < 0.5:
        array = array[::-1][::-1] if rng.random() < 0.5 else np.asfortranarray(array)
    if rng.random() < 0.5 and dtype != "uint16":
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if dtype.startswith("float"):
            tensor = tensor.to(rng.choice([torch.float32, torch.float64, torch.bfloat16])).requires_grad_()
        array = tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return array, picture


def break_file(rng: random.Random, content: bytes) -> bytes:
    """Cuts a file off, changes some of its bytes, or replaces it."""
    kind = rng.randrange(4)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        return rng.randbytes(rng.randrange(300))
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 30])):
        changed[rng.randrange(min(len(changed), 60) if kind == 2 else len(changed))] = rng.randrange(256)
    return bytes(changed)


def odd_input(rng: random.Random) -> Any:
    """Something that is no image."""
    floats = paint(rng).astype(np.float32)
    floats[0, 0, 0] = rng.choice([np.nan, np.inf, -np.inf])
    return rng.choice(
        [
            lambda: None,
            lambda: rng.choice([0, 3, 2.5, True]),
            dict,
            lambda: {"bytes": b"", "path": None},
            object,
            lambda: "",
            lambda: b"",
            lambda: "nowhere.png",
            lambda: "\0",
            lambda: "a" * 5000,
            lambda: "data:image/png;base64,",
            lambda: "data:,",
            lambda: "data:image/svg+xml,<svg/>",
            lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            lambda: "\ud800.png",
            lambda: Path("/"),
            list,
            lambda: [[]],
            lambda: [None],
            lambda: io.BytesIO(b"x"),
            lambda: floats,
            lambda: torch.from_numpy(floats),
            lambda: torch.from_numpy(floats).half(),
            lambda: np.zeros((5, 6, 3), complex),
            lambda: torch.zeros(3, 5, 6, dtype=torch.complex64),
            lambda: np.full((5, 6, 3), "a"),
            lambda: np.full((5, 6, 3), None),
            lambda: np.zeros((0, 6, 3), np.uint8),
            lambda: torch.zeros(3, 0, 6),
            lambda: np.zeros(7, np.uint8),
            lambda: np.zeros((), np.uint8),
            lambda: np.zeros((2, 2, 2, 2, 2), np.uint8),
            lambda: np.zeros((9, 8, rng.choice([2, 5])), np.uint8),
            lambda: torch.zeros(3, 5, 6, device="meta"),
            lambda: torch.zeros(3, 5, 6).to_sparse(),
            lambda: torch.quantize_per_tensor(torch.zeros(3, 5, 6), 0.1, 0, torch.quint8),
            lambda: np.full((5, 6, 4), 300, np.int32),
            lambda: Image.new("F", (4, 4), float("nan")),
            lambda: Image.new("I", (4, 4), -5),
            lambda: Image.new("RGB", (0, 4)),
        ]
    )()


def same_for_float8(rng: random.Random) -> tuple[Any, np.ndarray]:
    """A tensor of 8-bit floats, which NumPy does not know: whole numbers up to 16 are exact."""
    picture = in_color(np.full((9, 11), rng.randint(2, 16), np.uint8))
    return torch.from_numpy(picture).permute(2, 0, 1).float().to(torch.float8_e4m3fn), picture


def pixels(images: Any) -> torch.Tensor:
    values = PROCESSOR(images, return_tensors="pt")["pixel_values"]
    assert values.dtype == torch.float32 and values.shape[1:] == (3, 28, 28), f"{values.dtype} {list(values.shape)}"
    assert values.isfinite().all(), "pixels that are no numbers"
    return values


def check_image(seed: int, folder: Path) -> None:
    """What is read equals the picture; what is refused is refused clearly; a batch changes nothing."""
    rng = seeded_rng("image", seed)
    kind = rng.choice(["file", "file", "jpeg", "array", "array", "mode", "broken", "broken", "odd", "float8"])
    picture = None
    if kind in ("file", "jpeg"):
        content, picture = (encode_file if kind == "file" else encode_jpeg)(rng)
        image = carry(rng, content, folder)
    elif kind == "array":
        image, picture = encode_array(rng)
    elif kind == "mode":
        image, picture = rng.choice(MODES)(rng)
    elif kind == "float8":
        image, picture = (same_for_float8 if rng.random() < 0.1 else encode_array)(rng)
    elif kind == "broken":
        content, _ = (encode_file if rng.random() < 0.6 else encode_jpeg)(rng)
        broken = break_file(rng, content)
        image = broken
        if rng.random() < 0.5:
            image = folder / "broken.png"
            image.write_bytes(broken)
    else:
        image = odd_input(rng)
    shown = f"{kind} {describe_image(image)}"
    try:
        found = attempt(pixels, image, names=NAMES)
    except Exception as error:
        raise AssertionError(f"{shown}: {describe(error)}") from error
    if isinstance(found, CLEAR):
        assert picture is None or "float8" in shown, f"{shown} is refused: {describe(found)}"
        return
    assert kind != "odd", f"{shown} is taken for an image"
    if picture is not None:
        expected = pixels(Image.fromarray(in_color(picture)))
        difference = (found - expected).abs().max().item()
        is_exact = kind in ("file", "jpeg") and difference == 0
        assert is_exact or difference < ROUNDING, f"{shown}: pixels differ by up to {difference:.3f}"
    if not isinstance(image, list):
        neighbor = Image.fromarray(paint(rng))
        assert torch.equal(pixels([neighbor, image, neighbor])[1], found[0]), f"{shown}: differs in a batch"


def describe_image(image: Any) -> str:
    if isinstance(image, Image.Image):
        return f"{image.format} {image.mode} {image.size}"
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return f"{type(image).__name__} {image.dtype} {tuple(image.shape)}"
    return repr(image)[:60]


@blocks("images")
def test_images(seeds: list[int], tmp_path: Path) -> None:
    check_all(seeds, lambda seed: check_image(seed, tmp_path), seconds=60)


# Large images, in processes whose memory is limited


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def blank_png(width: int, height: int, depth: int, color_type: int, extra: bytes = b"") -> bytes:
    """A PNG of zeros, made without holding its pixels."""
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[color_type]
    row = bytes(1 + (width * depth * channels + 7) // 8)
    packer = zlib.compressobj(9)
    content = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(6)) if color_type == 3 else b""
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + palette + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    )


def process_large_image(seed: int) -> None:
    """In a process of its own: reads images near the limit of size, and beyond."""
    rng = seeded_rng("large image", seed)
    depth, color_type = rng.choice([(16, 0), (16, 2), (8, 2), (8, 6), (1, 3), (8, 0), (16, 6)])
    side = rng.choice([9400, 9400, 12000, 30000])
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(300 * MB), 9)) if rng.random() < 0.2 else b""
    height = side if side <= 12000 else 3  # much wider than high
    content = blank_png(side, height, depth, color_type, bomb)
    print(f"{side} x {height}, {depth} bits, color type {color_type}, {len(content)} bytes")
    found = attempt(pixels, content, names=NAMES)
    if isinstance(found, CLEAR):
        assert side * height > Image.MAX_IMAGE_PIXELS or bomb, f"refused: {describe(found)}"
    else:
        assert found.std(dim=(2, 3)).max() < 1e-5, "an image of zeros has one color"


@blocks("large_images")
def test_large_images_take_little_memory(seeds: list[int], jobs, tmp_path: Path) -> None:
    def check(seed: int) -> None:
        # Decoded, the largest of 8 bits takes 353 MB at four bytes per pixel, and once more where channels are joined.
        result = jobs.run("fuzz.test_images:process_large_image", seed, cwd=tmp_path, seconds=400, memory=1200 * MB)
        assert result.code is not None, f"too slow: {result.stdout}"
        assert result.code == 0, f"{result.stdout} {result.stderr[-400:]}"

    check_all(seeds, check, seconds=500)


@pytest.mark.parametrize("mode", MODES)
def test_the_ways_to_encode_lose_nothing(mode: Callable) -> None:
    """Or the cases above would test nothing."""
    for seed in range(20):
        image, picture = mode(seeded_rng("mode", seed))
        assert image.size == picture.shape[1::-1] and picture.dtype == np.uint8
