"""Pictures for the tests, and the published preprocessing written out plainly."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image

from pyiqa_qscorer.images import preprocessing
from pyiqa_qscorer.images.preprocessing import MEAN, STD


def random_image(height: int, width: int, seed: int, *, harsh: bool = False) -> Image.Image:
    """Noise; harsh: only 0 and 255, so that the bicubic filter overshoots and must be clipped."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.where(values < 128, 0, 255).astype(np.uint8) if harsh else values)


def to_tensor(image: Image.Image, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As torchvision's and pyiqa's to_tensor: (1, C, H, W), k / 255."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return (values.float() / 255 if dtype == torch.float32 else values.double() / 255).to(dtype)


def plain_levels(image: Image.Image, size: int) -> np.ndarray:
    """Padded on a full canvas and resized in one call: the published steps, literally."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, (0, (width - height) // 2) if width > height else ((height - width) // 2, 0))
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))


def plain_pixels(image: Image.Image, size: int = 448) -> torch.Tensor:
    """The published rescale and normalisation, with numpy."""
    scaled = (plain_levels(image, size) * 0.00392156862745098).astype(np.float32)
    normalised = (scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(normalised).permute(2, 0, 1)


def matrix_levels(images: torch.Tensor, size: int) -> np.ndarray:
    """(1, 3, H, W) through the matrices, also where Pillow would be used: (size, size, 3)."""
    return preprocessing._resize_with_matrices(images, size)[0].permute(1, 2, 0).numpy()


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG by hand: Pillow cannot write 16-bit colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )
