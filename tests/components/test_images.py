from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.contracts import Preprocessing, UndecodableImage
from components.images import MAX_PIXELS, batches, decode, in_threads, pixel_digest, prepare

SQUARE = Preprocessing(
    channels=3, height=32, width=32, resize_shortest=36, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, format=kind, **options)
    return data.getvalue()


def gradient(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    pixels = np.stack([x * 6, y * 8, (x + y) * 3], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF"])
def test_accepted_formats_decode(kind: str) -> None:
    image = decode(encoded(gradient(), kind))
    assert image.mode == "RGB"
    assert image.size == (40, 30)


@pytest.mark.parametrize(
    ("mode", "kind", "expected"),
    [
        ("L", "PNG", "L"),
        ("1", "PNG", "L"),
        ("P", "PNG", "RGB"),
        ("CMYK", "JPEG", "RGB"),
        ("RGBA", "PNG", "RGB"),
        ("LA", "PNG", "L"),
    ],
)
def test_every_mode_becomes_8_bit_grey_or_rgb(mode: str, kind: str, expected: str) -> None:
    assert decode(encoded(gradient(mode), kind)).mode == expected


def test_16_bit_grey_is_scaled() -> None:
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    assert np.asarray(decode(encoded(Image.fromarray(values)))).tolist() == [[0, 1, 255]]


def test_transparency_is_put_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert decode(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(gradient(), "JPEG", exif=exif)).size == (30, 40)


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 100)) + chunk(b"IEND", b"")


def test_hostile_and_damaged_files_are_refused_with_a_reason() -> None:
    whole = encoded(gradient(), "JPEG")
    frames = io.BytesIO()
    gradient().save(frames, format="WEBP", save_all=True, append_images=[gradient("L").convert("RGB")])
    refused = {
        b"": "empty",
        b"not an image at all": "accepted format",
        whole[: len(whole) // 2]: "truncated",
        bomb(65_000, 65_000): "pixels",
        frames.getvalue(): "still",
        encoded(gradient("P"), "GIF"): "accepted format",
    }
    for data, reason in refused.items():
        with pytest.raises(UndecodableImage, match=reason):
            decode(data)
    # Between our limit and the one at which Pillow itself refuses.
    assert MAX_PIXELS < 8000 * 7000 < 2 * (Image.MAX_IMAGE_PIXELS or 0)
    with pytest.raises(UndecodableImage, match="8000x7000 pixels"):
        decode(bomb(8000, 7000))


def test_mutated_files_decode_or_are_refused_and_never_crash() -> None:
    rng = np.random.default_rng(7)
    outcomes = {"decoded": 0, "refused": 0}
    for kind in ("JPEG", "PNG"):
        original = encoded(gradient(), kind)
        for _ in range(300):
            data = bytearray(original)
            for position in rng.integers(0, len(data), rng.integers(1, 4)):
                data[position] = rng.integers(256)
            end = len(data) if rng.random() < 0.8 else int(rng.integers(len(data)))
            try:
                decode(bytes(data[:end]))
                outcomes["decoded"] += 1
            except UndecodableImage:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_prepare_resizes_and_crops_to_the_contract() -> None:
    pixels = prepare(gradient(size=(80, 50)), SQUARE)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    grey = SQUARE.model_copy(update={"channels": 1, "mean": (0.5,), "std": (0.5,)})
    assert prepare(gradient(), grey).shape == (32, 32, 1)


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    exact = SQUARE.model_copy(update={"resize_shortest": 32})
    image = gradient(size=(32, 32))
    assert np.array_equal(prepare(image, exact), np.asarray(image))


def test_the_pixel_digest_sees_pixels_and_not_encodings() -> None:
    png, bmp = decode(encoded(gradient(), "PNG")), decode(encoded(gradient(), "BMP"))
    assert pixel_digest(png) == pixel_digest(bmp)
    png.putpixel((0, 0), (1, 2, 3))
    assert pixel_digest(png) != pixel_digest(bmp)


def test_threads_keep_the_order() -> None:
    assert list(in_threads(lambda n: n * n, list(range(200)))) == [n * n for n in range(200)]


def test_batches_name_the_file_that_does_not_decode(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"nope")
    with pytest.raises(UndecodableImage, match=r"bad\.png"):
        list(batches([tmp_path / "bad.png"], SQUARE, batch_size=2))


def test_an_extreme_picture_is_cut_to_its_middle_before_it_is_resized() -> None:
    import tracemalloc

    contract = Preprocessing(
        channels=3, height=224, width=224, resize_shortest=224, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    row = np.zeros((1, 20_001, 3), dtype=np.uint8)
    row[:, 10_000] = 255
    tracemalloc.start()
    for pixels in (row, row.transpose(1, 0, 2).copy()):
        assert prepare(Image.fromarray(pixels), contract).shape == (224, 224, 3)
        assert prepare(Image.fromarray(pixels), contract).max() > 250
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        data, "JPEG", progressive=True
    )
    assert decode(data.getvalue()).size == (64, 64)
    place = data.getvalue().rfind(b"\xff\xda")
    scan = data.getvalue()[place:-2]
    with pytest.raises(UndecodableImage, match="more than 100 scans"):
        decode(data.getvalue()[:-2] + scan * 1000 + b"\xff\xd9")
