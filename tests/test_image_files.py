"""Reading images: files of every kind, and bad ones."""

import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, png, random_image, to_tensor
from PIL import Image, ImageFile

from pyiqa_qscorer.errors import ImageError
from pyiqa_qscorer.images import reading as image_files
from pyiqa_qscorer.images.preprocessing import pixels_from_pil, pixels_from_tensor
from pyiqa_qscorer.images.reading import open_image


def all_routes(path: Path) -> list[Image.Image]:
    """A file read as path, str, bytes, and PIL image: they must agree."""
    with Image.open(path) as image:
        opened = [open_image(s) for s in (path, str(path), path.read_bytes(), image)]
    for image in opened:
        assert image.mode == "RGB" and image.tobytes() == opened[0].tobytes()
    return opened


def saved(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


MODES = [("RGB", "a.png"), ("RGBA", "a.png"), ("L", "a.png"), ("LA", "a.png"), ("1", "a.png"), ("P", "a.png")]
MODES += [("P", "a.gif"), ("RGBA", "a.webp"), ("CMYK", "a.tif"), ("CMYK", "a.jpg"), ("YCbCr", "a.jpg"), ("L", "a.jpg")]


@pytest.mark.parametrize("mode,name", [*MODES, ("LAB", "a.tif")])
def test_modes_are_converted_as_pillow_does(mode: str, name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, random_image(12, 17, seed=3).convert(mode), name)
    with Image.open(path) as image:
        expected = np.array(image.convert("RGB"))
    for image in all_routes(path):
        np.testing.assert_array_equal(np.array(image), expected)
        assert torch.equal(pixels_from_pil(image, 20), pixels_from_tensor(to_tensor(image), 20)[0])


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_alpha_is_dropped_not_composited_and_cmyk_is_not_inverted(tmp_path: Path) -> None:
    values = np.array([[[10, 20, 30, 0], [40, 50, 60, 128]]], np.uint8)
    image = all_routes(saved(tmp_path, Image.fromarray(values), "alpha.png"))[0]
    np.testing.assert_array_equal(np.array(image), values[..., :3])
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    for transparency in (0, b"\x00\x80"):
        opened = all_routes(saved(tmp_path, palette, "palette.png", transparency=transparency))[0]
        assert np.array(opened).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    cyan = all_routes(saved(tmp_path, Image.new("CMYK", (3, 2), (255, 0, 0, 0)), "cyan.tif"))[0]
    assert cyan.getpixel((0, 0)) == (0, 255, 255)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_rotation_is_not_applied(orientation: int, tmp_path: Path) -> None:
    image, exif = random_image(8, 20, seed=0), Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, image, "rotated.png", exif=exif)
    with Image.open(path) as check:
        assert check.getexif()[0x0112] == orientation
    opened = all_routes(path)[0]
    assert opened.size == (20, 8) and opened.tobytes() == image.tobytes()


@pytest.mark.parametrize("name", ["gray16.png", "gray16.tif"])
def test_16_bit_gray_is_refused(name: str, tmp_path: Path) -> None:
    """Pillow's conversion clips it to white, as it would here for nearly every value."""
    values = np.linspace(0, 65535, 20).astype(np.uint16).reshape(4, 5)
    path = saved(tmp_path, Image.fromarray(values), name)
    with Image.open(path) as image:
        clipped = np.array(image.convert("RGB"))
        assert (clipped[1:] == 255).all()
        for source in (path, path.read_bytes(), image):
            with pytest.raises(ImageError, match=r"mode 'I;16.*clip every value above 255") as e:
                open_image(source)
        assert "(numpy.asarray(image) / 257).round().astype('uint8')" in str(e.value)
        advised = Image.fromarray((np.asarray(image) / 257).round().astype("uint8"))
    assert np.array(open_image(advised))[..., 0].flatten().tolist() == [
        round(v / 257) for v in values.flatten().tolist()
    ]


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B"])
def test_deep_gray_modes_are_refused(mode: str) -> None:
    """Whatever their values: a rule that depends on the values would surprise."""
    with pytest.raises(ImageError, match=f"PIL image: mode '{mode}' has more than 8 bits"):
        open_image(Image.new(mode, (3, 3)))
    with pytest.raises(ImageError, match="more than 8 bits"):
        pixels_from_pil(Image.new(mode, (3, 3)))


@pytest.mark.parametrize("colour_type,channels", [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_keeps_the_upper_8_bits(colour_type: int, channels: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (4, 5, channels), dtype=np.uint16)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    path = tmp_path / "colour16.png"
    path.write_bytes(png(5, 4, 16, colour_type, rows))
    upper = (values >> 8).astype(np.uint8)
    expected = upper[..., :3] if channels > 2 else upper[..., :1].repeat(3, axis=2)
    np.testing.assert_array_equal(np.array(all_routes(path)[0]), expected)


def test_frames_and_files_that_go_away(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    for name in ("animated.png", "animated.gif"):
        path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        assert open_image(path).getpixel((2, 2)) == (255, 0, 0)
        with Image.open(path) as image:
            assert image.n_frames == 3
            image.seek(2)
            assert open_image(image).getpixel((2, 2)) == (0, 0, 255)
    # BMP and TIFF may be mapped from the file: the file can be deleted at once.
    for name in ("a.bmp", "a.tif", "a.png", "a.ppm"):
        expected = random_image(9, 9, seed=0)
        path = saved(tmp_path, expected, name)
        image = open_image(path)
        path.unlink()
        assert image.tobytes() == expected.tobytes()


def refused(source: object, *words: str) -> ImageError:
    with pytest.raises(ImageError) as caught:
        open_image(source)  # type: ignore[arg-type]
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
    return caught.value


def test_missing_and_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("nowhere.png", "image 'nowhere.png'", "no such file in", str(tmp_path), "check the path")
    refused(tmp_path / "nowhere.png", str(tmp_path / "nowhere.png"), "no such file")
    refused("", "image ''", "no such file")
    refused("with\0zero.png", "no such file")
    refused("https://example.org/a.png", "URLs are not fetched")
    refused(tmp_path, str(tmp_path), "it is a folder")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "pipe.png", "not a regular file")
    for source in (None, 7, 1.5, [b"x"], np.zeros((4, 4, 3)), torch.zeros(1)):
        refused(source, "source must be a path", f"got {type(source).__name__}")
    path = saved(tmp_path, random_image(4, 4, seed=0), "secret.png")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root
    refused(path, "secret.png", "no permission to read")


@pytest.mark.parametrize("content", [b"hello, I am text", b"\x89PNG", b"\x00" * 500, b"GIF89a", b""])
def test_empty_or_not_an_image(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "not_an_image.png"
    path.write_bytes(content)
    words = ["not an image that Pillow can read"] if content else ["empty"]
    refused(content, f"image given as {len(content)} bytes", *words)
    words = words if content else ["the file is empty (0 bytes)", "copy or download it again"]
    refused(path, "not_an_image.png", *words)


FORMATS: list[tuple[str, dict]] = [(name, {}) for name in ("PNG", "BMP", "TIFF", "GIF", "PPM")]
FORMATS += [("JPEG", {"quality": 95}), ("JPEG", {"quality": 95, "progressive": True}), ("WEBP", {"lossless": True})]


@pytest.fixture(params=[False, True], ids=["strict", "tolerant"])
def pil_switch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """PIL's process-wide switch; importing pyiqa's AVA dataset sets it to True."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", request.param)
    return request.param


@pytest.mark.parametrize("file_format,options", FORMATS)
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_files(file_format: str, options: dict, kept: float, tmp_path: Path, pil_switch: bool) -> None:
    content = encoded(random_image(64, 80, seed=0), file_format, **options)
    content, path = content[: int(len(content) * kept)], tmp_path / "cut.image"
    path.write_bytes(content)
    refused(path, "cut.image", "copy")
    refused(content, f"image given as {len(content)} bytes")
    try:
        lazy = Image.open(path)
    except OSError:
        pass  # WebP decodes on opening
    else:
        with lazy:
            refused(lazy, "PIL image", "cut.image", "cannot be decoded")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is pil_switch


def test_truncated_files_fail_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """With PIL set to tolerate them: threads that start and end while others decode."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    content = encoded(random_image(64, 80, seed=0), "JPEG")
    outcomes: list[str] = []

    def work() -> None:
        for _ in range(20):
            open_image(content)
            try:
                open_image(content[:-500])
                outcomes.append("accepted")
            except ImageError:
                outcomes.append("refused")

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == ["refused"] * 120 and ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("file_format,options", FORMATS)
def test_damaged_files_never_raise_anything_else(file_format, options, monkeypatch) -> None:
    """Damage can go unnoticed by a decoder, but what it notices must be an ImageError."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # damaged sizes can be large
    content = encoded(random_image(24, 30, seed=0), file_format, **options)
    random, refusals = np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(content)
        for position in random.integers(0, min(len(content), 400), size=6):
            damaged[position] = random.integers(256)
        try:
            open_image(bytes(damaged))
        except ImageError:
            refusals += 1
    assert refusals > 0


def test_decompression_bombs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Refused beyond twice PIL's limit; between one and two limits PIL warns, which may be made an error."""
    image = random_image(20, 20, seed=0)
    path = saved(tmp_path, image, "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.warns(Image.DecompressionBombWarning):
        assert open_image(path).tobytes() == image.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        refused(path, "bomb.png", "400 pixels", "MAX_IMAGE_PIXELS")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for source in (path, path.read_bytes()):
        refused(source, "image ", "400 pixels", "limit of 200", "raise PIL.Image.MAX_IMAGE_PIXELS")


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0), (65_536, 1)])
def test_impossible_sizes(size: tuple[int, int]) -> None:
    refused(Image.new("RGB", size), f"its size is {size[0]}x{size[1]}", "1 to 65535 pixels")


def test_closed_images_no_memory_and_interrupts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved(tmp_path, random_image(4, 4, seed=0), "a.png")
    closed = Image.open(path)
    closed.close()
    refused(closed, "PIL image", "a.png", "cannot be decoded")

    def fail(self: ImageFile.ImageFile) -> None:
        raise errors.pop()

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    errors: list[BaseException] = [KeyboardInterrupt(), MemoryError()]
    refused(path, "a.png", "not enough memory")
    with pytest.raises(KeyboardInterrupt):
        open_image(path)
    assert image_files._decoding_count == 0
