"""Image processors: the original's preprocessing, and every damaged or odd input a user may pass."""

import base64
import contextlib
import io
import json
import subprocess
import warnings
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote_from_bytes

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.utils import is_torchvision_available

from lavit_hf.processing import image_processing_pil_lavit
from lavit_hf.processing.image_processing_lavit import LavitImageProcessor
from lavit_hf.processing.image_processing_pil_lavit import LavitImageProcessorPil, to_rgb

DATA = Path(__file__).parents[1] / "data" / "tiny-original"
IMAGES = [DATA / "images" / f"{i}.png" for i in range(3)]


@pytest.fixture(scope="module")
def processor() -> LavitImageProcessorPil:
    return LavitImageProcessorPil(size={"height": 56, "width": 56})


@pytest.fixture
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))


def pixels(processor, images) -> torch.Tensor:
    return processor(images, return_tensors="pt")["pixel_values"]


def file_bytes(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_golden_pixel_values(processor):
    expected = load_file(DATA / "golden.safetensors")["pixel_values"]
    # a batch of mixed sizes, and every way to pass a file
    as_paths = pixels(processor, IMAGES)
    torch.testing.assert_close(as_paths, expected, atol=1e-6, rtol=0)
    for images in (
        [str(path) for path in IMAGES],
        [path.read_bytes() for path in IMAGES],
        [Image.open(path) for path in IMAGES],
        [np.array(Image.open(path).convert("RGB")) for path in IMAGES],
        [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in IMAGES],
        [[Image.open(IMAGES[0])], [], [Image.open(IMAGES[1]), Image.open(IMAGES[2])]],
    ):
        assert torch.equal(pixels(processor, images), as_paths)


def test_default_is_the_published_preprocessing(photo):
    processor = LavitImageProcessorPil()
    assert pixels(processor, photo).shape == (1, 3, 224, 224)
    assert processor.to_dict()["image_processor_type"] == "LavitImageProcessor"


def test_save_and_load(tmp_path, processor, photo):
    processor.save_pretrained(tmp_path)
    again = LavitImageProcessorPil.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert torch.equal(pixels(again, photo), pixels(processor, photo))


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_torchvision_backend_says_what_it_needs():
    with pytest.raises(ImportError, match="[Tt]orchvision"):
        LavitImageProcessor()


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
def test_backends_agree(processor, photo):
    fast = LavitImageProcessor(size={"height": 56, "width": 56})
    torch.testing.assert_close(pixels(fast, [photo, *IMAGES]), pixels(processor, [photo, *IMAGES]), atol=0.05, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 20000), (1, 50)])
def test_extreme_sizes(processor, size):
    image = Image.new("RGB", size, (255, 0, 0))
    values = pixels(processor, image)
    assert values.shape == (1, 3, 56, 56)
    torch.testing.assert_close(values, values[..., :1, :1].expand_as(values))
    assert torch.equal(pixels(processor, np.asarray(image)), values)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "La", "RGBa"])
def test_modes(processor, photo, mode):
    if mode == "La":
        image = photo.convert("LA").convert("La")
    elif mode == "RGBa":
        image = photo.convert("RGBA").convert("RGBa")
    elif mode == "PA":
        image = photo.convert("P").convert("PA")
    else:
        image = photo.convert(mode)
    assert image.mode == mode
    values = pixels(processor, image)
    reference = photo.convert("1").convert("RGB") if mode == "1" else photo
    if mode in ("L", "LA", "La"):
        reference = photo.convert("L")
    assert (values - pixels(processor, reference)).abs().mean() < 0.3


def test_transparency_is_composited_onto_white(processor, tmp_path):
    white = pixels(processor, Image.new("RGB", (8, 8), "white"))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert torch.equal(pixels(processor, clear), white)
    assert torch.equal(pixels(processor, clear.convert("LA")), white)
    assert torch.equal(pixels(processor, np.asarray(clear)), white)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert torch.equal(pixels(processor, tmp_path / "palette.png"), white)
    Image.new("L", (8, 8), 7).save(tmp_path / "grey.png", transparency=7)
    assert torch.equal(pixels(processor, tmp_path / "grey.png"), white)


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "F255", "F1", "uint16"])
def test_16_bit_and_float_images_are_scaled_not_clipped(processor, tmp_path, mode):
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8)[None], (32, 1))
    expected = pixels(processor, Image.fromarray(grey))
    wide = grey.astype(np.uint16) * 257
    if mode == "I;16":
        Image.fromarray(wide).save(tmp_path / "grey16.png")
        assert Image.open(tmp_path / "grey16.png").mode in ("I;16", "I")
        image = tmp_path / "grey16.png"
    elif mode == "uint16":
        image = wide
    elif mode == "I":
        image = Image.fromarray(wide.astype(np.int32))
        assert image.mode == "I"
    else:
        scale = {"F": 65535 / 255, "F255": 1, "F1": 1 / 255}[mode]
        image = Image.fromarray(grey.astype(np.float32) * np.float32(scale))
        assert image.mode == "F"
    torch.testing.assert_close(pixels(processor, image), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("values", [[[np.nan]], [[np.inf]], [[-1.0]], [[1e6]]])
def test_bad_float_images(processor, values):
    with pytest.raises(ValueError, match="NaN|range"):
        pixels(processor, Image.fromarray(np.array(values, dtype=np.float32)))


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_arrays_and_tensors(processor, make, value):
    image = np.zeros((3, 8, 8), dtype=np.float32)
    image[1, 2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        pixels(processor, make(image))


@pytest.mark.parametrize(
    "shape", [(2, 8, 8), (5, 8, 8), (8, 8, 2), (8, 8, 7), (8,), (1, 1, 1, 8, 8), (0, 8, 3), (3, 0, 8)]
)
def test_wrong_array_shapes(processor, shape):
    with pytest.raises(ValueError, match="channels|dimensions|empty"):
        pixels(processor, np.zeros(shape, dtype=np.uint8))


def test_wrong_dtype(processor):
    with pytest.raises(ValueError, match="numbers"):
        pixels(processor, np.full((3, 4, 4), "x"))
    with pytest.raises(ValueError, match="range"):
        pixels(processor, np.full((3, 4, 4), 300, dtype=np.int64))


def test_grey_and_boolean_arrays(processor, photo):
    grey = np.asarray(photo.convert("L"))
    expected = pixels(processor, photo.convert("L"))
    for image in (grey, grey[None], grey[..., None], torch.from_numpy(grey.copy())):
        assert torch.equal(pixels(processor, image), expected)
    assert torch.equal(pixels(processor, grey > 99), pixels(processor, ((grey > 99) * 255).astype(np.uint8)))


def test_float_rgba_arrays(processor):
    rgba = np.zeros((8, 8, 4), dtype=np.float32)
    rgba[:4] = 255
    rgba[4:, :, 0] = 255
    white, black = np.full((8, 8, 3), 255, np.uint8), np.zeros((8, 8, 3), np.uint8)
    assert torch.equal(pixels(processor, rgba[:4]), pixels(processor, white[:4]))
    assert torch.equal(pixels(processor, rgba[4:]), pixels(processor, white[:4]))  # transparent
    rgba[4:] = [0, 0, 0, 255]
    assert torch.equal(pixels(processor, rgba[4:]), pixels(processor, black[:4]))
    scaled = processor(rgba[:4] / 255, do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(scaled, pixels(processor, rgba[:4]), atol=0.05, rtol=0)
    with pytest.raises(ValueError, match="values from 0 to 255"):
        pixels(processor, rgba * 2)


def test_without_conversion_channels_stay(processor):
    values = processor(np.zeros((8, 8), np.uint8), do_convert_rgb=False, do_normalize=False, return_tensors="pt")[
        "pixel_values"
    ]
    assert values.shape == (1, 1, 56, 56)


def test_batched_array(processor):
    batch = np.zeros((2, 3, 8, 8), dtype=np.uint8)
    assert pixels(processor, batch).shape == (2, 3, 56, 56)
    assert pixels(processor, torch.from_numpy(batch)).shape == (2, 3, 56, 56)


def test_half_precision_tensors(processor):
    image = torch.rand(3, 8, 8, requires_grad=True)
    values = processor(image.to(torch.bfloat16), do_rescale=False, return_tensors="pt")["pixel_values"]
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("images", [None, [], [[]], [[], []], [None], 3, {"a": 1}, [[None]]])
def test_no_image(processor, images):
    with pytest.raises(ValueError, match="image"):
        processor(images, return_tensors="pt")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("as_what", ["path", "bytes", "lazy"])
def test_truncated_files(processor, photo, tmp_path, format, as_what):
    data = file_bytes(photo, format)
    data = data[: len(data) * 2 // 3]
    path = tmp_path / "truncated"
    path.write_bytes(data)
    if as_what == "lazy":
        try:
            image = Image.open(path)  # fails at once for some formats: then there is nothing to pass
        except Exception:
            return
    else:
        image = path if as_what == "path" else data
    with pytest.raises(ValueError, match="truncated|corrupt|Cannot"):
        pixels(processor, image)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC picture.*pip install pillow-heif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "is a HEIC picture"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing.*export it as PNG"),
    ],
)
def test_formats_that_pillow_does_not_know_say_what_to_do(processor, tmp_path, data, message):
    path = tmp_path / "picture"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        pixels(processor, data)
    with pytest.raises(ValueError, match=message) as error:
        pixels(processor, path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a"])
def test_corrupt_files(processor, tmp_path, data):
    path = tmp_path / "corrupt.png"
    path.write_bytes(data)
    for image in (path, str(path), data):
        with pytest.raises(ValueError, match="Cannot read"):
            pixels(processor, image)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_flipped_bytes_give_an_error_or_an_image(processor, photo):
    rng = np.random.default_rng(1)
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF"):
        data = bytearray(file_bytes(photo, format))
        for _ in range(60):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 4):
                damaged[position] ^= int(rng.integers(1, 256))
            with contextlib.suppress(ValueError):
                assert pixels(processor, bytes(damaged)).isfinite().all()


def test_missing_file_and_directory(processor, tmp_path):
    for source in (tmp_path / "none.png", str(tmp_path / "none.png"), "none.png", tmp_path, "", "\0", "x" * 5000):
        with pytest.raises(ValueError, match="not found|Cannot read|base64"):
            pixels(processor, source)


def test_base64_and_data_uri(processor, photo):
    text = base64.b64encode(file_bytes(photo)).decode()
    expected = pixels(processor, photo)
    assert torch.equal(pixels(processor, text), expected)
    assert torch.equal(pixels(processor, f"data:image/png;base64,{text}"), expected)


def test_url(processor, photo, monkeypatch):
    class Session:
        def get(self, url, **options):
            if not url.endswith("photo.png"):
                raise OSError("404")
            return SimpleNamespace(content=file_bytes(photo), raise_for_status=lambda: None)

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert torch.equal(pixels(processor, "https://example.org/photo.png"), pixels(processor, photo))
    with pytest.raises(ValueError, match="Cannot download an image from http://example.org/none: 404"):
        pixels(processor, "http://example.org/none")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(processor, photo, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "rotated.png"
    photo.save(path, exif=exif)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[orientation]
    upright = photo if undo is None else photo.transpose(undo)
    expected = pixels(processor, upright)
    assert torch.equal(pixels(processor, path), expected)
    assert torch.equal(pixels(processor, Image.open(path)), expected)
    assert torch.equal(pixels(processor, to_rgb(to_rgb(Image.open(path)))), expected)


def test_animated_gif_uses_its_first_frame(processor, tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    values = pixels(processor, tmp_path / "a.gif")
    torch.testing.assert_close(values, pixels(processor, frames[0]), atol=0.05, rtol=0)


@pytest.mark.parametrize("factor", [1.5, 3])
def test_decompression_bombs_are_errors(processor, tmp_path, monkeypatch, factor):
    path = tmp_path / "bomb.png"
    Image.new("1", (300, 200)).save(path)
    image = Image.open(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(300 * 200 / factor))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for bomb in (path, path.read_bytes(), image):
            with pytest.raises(ValueError, match="pixels|too large"):
                pixels(processor, bomb)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert pixels(processor, path).shape == (1, 3, 56, 56)


def test_scaled_floats_are_warned_about(processor, monkeypatch):
    warned = []
    monkeypatch.setattr(image_processing_pil_lavit.logger, "warning_once", warned.append)
    image = np.random.default_rng(0).random((8, 8, 3), dtype=np.float32)
    unscaled = processor((image * 255).round(), return_tensors="pt")["pixel_values"]
    scaled = processor(image, do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(scaled, unscaled, atol=0.05, rtol=0)
    assert not warned
    processor(image, return_tensors="pt")
    assert "do_rescale=False" in warned[0]


def test_config_is_plain_json(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert config["size"] == {"height": 56, "width": 56}
    assert config["image_processor_type"] == "LavitImageProcessor"


def test_large_16_bit_images_need_little_memory(python, tmp_path):
    path = tmp_path / "large.png"
    Image.fromarray(np.zeros((6000, 6000), np.uint16)).save(path)
    program = (
        "import resource, sys\n"
        "from lavit_hf.processing.image_processing_pil_lavit import LavitImageProcessorPil\n"
        "processor, before = LavitImageProcessorPil(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "processor(sys.argv[1:], return_tensors='pt')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    run = subprocess.run([python, "-c", program, *[str(path)] * 3], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 300  # MB; it was more than 900 for one of them


@pytest.mark.parametrize(
    "backend",
    [
        LavitImageProcessorPil,
        pytest.param(
            LavitImageProcessor,
            marks=pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision"),
        ),
    ],
)
def test_pictures_of_a_batch_do_not_wait_at_full_size(backend, photo, monkeypatch):
    own = backend(size={"height": 20, "width": 10})
    shapes = []
    preprocess = own._preprocess

    def spy(images, **kwargs):
        shapes.extend(image.shape for image in images)
        return preprocess(images, **kwargs)

    whole = pixels(own, [photo, IMAGES[0], photo.convert("L")])
    monkeypatch.setattr(own, "_preprocess", spy)
    assert torch.equal(pixels(own, [photo, IMAGES[0], photo.convert("L")]), whole)
    assert shapes == [(3, 20, 10)] * 3


def test_strips_change_nothing(processor, photo, monkeypatch):
    images = [photo.convert(mode) for mode in ("1", "L", "P", "RGBA", "CMYK", "LA")]
    images += [Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(40, 30) * 50), photo]
    whole = pixels(processor, images)
    monkeypatch.setattr(image_processing_pil_lavit, "_STRIP_PIXELS", 70)
    assert torch.equal(pixels(processor, images), whole)
    assert torch.equal(pixels(processor, [np.asarray(to_rgb(image)) for image in images]), whole)


def test_float8_meta_and_sparse_tensors(processor):
    image = torch.full((3, 8, 8), 64.0)
    assert torch.equal(pixels(processor, image.to(torch.float8_e4m3fn)), pixels(processor, image))
    with pytest.raises(ValueError, match="device meta"):
        pixels(processor, image.to("meta"))
    with pytest.raises(ValueError, match="dense"):
        pixels(processor, image.to_sparse())
    with pytest.raises(ValueError, match=r"dtype torch\.quint8"):
        pixels(processor, torch.quantize_per_tensor(image, 1.0, 0, torch.quint8))


@pytest.mark.parametrize(
    "values",
    [
        {"rescale_factor": None},
        {"image_mean": [float("nan")] * 3},
        {"image_mean": ["a"] * 3},
        {"image_mean": [0.5]},
        {"image_std": True},
        {"image_std": [0.5, 0, 0.5]},  # pixels would be infinite
    ],
)
def test_settings_that_are_no_numbers(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} must be a number"):
        LavitImageProcessorPil(**values)
    LavitImageProcessorPil(do_rescale=False, do_normalize=False, **values)


def test_data_uri_in_percent_encoding(processor, photo):
    uri = "data:image/png," + quote_from_bytes(file_bytes(photo))
    assert torch.equal(pixels(processor, uri), pixels(processor, photo))
    with pytest.raises(ValueError, match="data URI"):
        pixels(processor, "data:image/png")
