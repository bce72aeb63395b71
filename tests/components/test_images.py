from __future__ import annotations

import io
import itertools
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from components.colours import matrix_profile
from components.contracts.errors import UndecodableImage
from components.contracts.models import Preprocessing
from components.formats import Accepted
from components.images import Picture, batches, decode, in_threads, pixel_digest, prepare

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
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
    image = decode(encoded(gradient(), kind)).stored
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
    assert decode(encoded(gradient(mode), kind)).stored.mode == expected


def test_16_bit_grey_is_scaled() -> None:
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    assert np.asarray(decode(encoded(Image.fromarray(values))).stored).tolist() == [[0, 1, 255]]


def test_transparency_is_put_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert decode(encoded(clear)).stored.getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(gradient(), "JPEG", exif=exif)).stored.size == (30, 40)


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
        encoded(gradient("P"), "GIF"): "a GIF, which is not an accepted format.*JPEG, PNG, WebP",
        b"\0\0\0\x18ftypheic" + b"\0" * 99: "a HEIC or HEIF picture",
        b"<!DOCTYPE html><html></html>": "a web page",
    }
    for data, reason in refused.items():
        with pytest.raises(UndecodableImage, match=reason):
            decode(data)
    with pytest.raises(UndecodableImage, match="9000x8000 pixels, accepted are up to 67108864"):
        decode(bomb(9000, 8000), Accepted())
    with pytest.raises(UndecodableImage, match="8000x7000 pixels, accepted are up to 1000"):
        decode(bomb(8000, 7000), Accepted(max_pixels=1000))


def test_the_brands_of_phone_pictures_are_told_from_films() -> None:
    pictures = {
        "a HEIC or HEIF picture": ("heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "mif2", "msf1", "miaf", "MiHE"),
        "an AVIF picture": ("avif", "avis", "avio", "MA1A", "MA1B"),
        "a film": ("isom", "mp42", "qt  ", "MSNV", "M4V "),
    }
    told = {}
    for brands in pictures.values():
        for brand in brands:
            with pytest.raises(UndecodableImage) as refused:
                decode(b"\0\0\0\x18ftyp" + brand.encode() + b"\0" * 99)
            told[brand] = str(refused.value)
    end = "which is not an accepted format (JPEG, PNG, WebP, BMP, PPM, TIFF); convert it to JPEG or PNG"
    assert told == {brand: f"{name}, {end}" for name, brands in pictures.items() for brand in brands}


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
    pixels = prepare(Picture(gradient(size=(80, 50))), SQUARE)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    grey = SQUARE.model_copy(update={"channels": 1, "mean": (0.5,), "std": (0.5,)})
    assert prepare(Picture(gradient()), grey).shape == (32, 32, 1)


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    exact = SQUARE.model_copy(update={"resize_shortest": 32})
    image = gradient(size=(32, 32))
    assert np.array_equal(prepare(Picture(image), exact), np.asarray(image))


def test_the_pixel_digest_sees_pixels_and_not_encodings() -> None:
    png, bmp = decode(encoded(gradient(), "PNG")), decode(encoded(gradient(), "BMP"))
    assert pixel_digest(png) == pixel_digest(bmp)
    png.stored.putpixel((0, 0), (1, 2, 3))
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
        assert prepare(Picture(Image.fromarray(pixels)), contract).shape == (224, 224, 3)
        assert prepare(Picture(Image.fromarray(pixels)), contract).max() > 250
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        data, "JPEG", progressive=True
    )
    assert decode(data.getvalue()).width == 64
    place = data.getvalue().rfind(b"\xff\xda")
    scan = data.getvalue()[place:-2]
    with pytest.raises(UndecodableImage, match="more than 100 scans"):
        decode(data.getvalue()[:-2] + scan * 1000 + b"\xff\xd9")


def png_with(*chunks: tuple[bytes, bytes], behind: bytes = b"", image: Image.Image | None = None) -> bytes:
    """A PNG with chunks behind its header."""
    plain = encoded(image or gradient())
    parts = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return plain[:33] + parts + plain[33:] + behind


def jpeg_with(
    *segments: tuple[int, bytes], behind: bytes = b"", image: Image.Image | None = None, **options: object
) -> bytes:
    """A JPEG with segments behind its first one."""
    plain = encoded(image or gradient(), "JPEG", quality=95, **options)
    return (
        plain[:20]
        + b"".join(struct.pack(">BBH", 255, code, len(body) + 2) + body for code, body in segments)
        + (plain[20:] + behind)
    )


LONG = b"x" * (3 << 20)
SCANS = b"\xff\xda" * 500
TURNED = Image.Exif()
TURNED[0x0112] = 6
MPF = b"MPF\0MM\0*\0\0\0\x08\0\x03\xb0\0\0\7\0\0\0\x040100\xb0\1\0\4\0\0\0\1\0\0\0\2\xb0\2\0\7\0\0\0\x20\0\0\xff\xff\0\0\0\0"
"""The index of a phone's previews, whose entries an editor has cut off."""


@pytest.mark.parametrize(
    "data",
    [
        png_with((b"zTXt", b"Comment\0\0" + zlib.compress(LONG))),
        png_with((b"tEXt", b"Comment\0" + LONG)),
        png_with((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG))),
        png_with((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + LONG)),
        png_with((b"iCCP", b"profile\0\0" + zlib.compress(LONG))),
        png_with((b"iCCP", b"profile\0\0" + zlib.compress(LONG * 10))),
        png_with((b"iCCP", b"profile\0\7nothing")),
        png_with((b"zTXt", b"broken")),
        png_with((b"caBX", LONG), (b"mkBT", LONG), behind=b"PK\x03\x04" + LONG),
        png_with((b"eXIf", b"MM\0*\xff\xff\xff\xff")),
        png_with((b"tIME", b"x")).replace(b"tIMEx", b"tIMEy"),
        jpeg_with((0xE1, b"Exif\0\0" + SCANS), (0xE2, SCANS), (0xED, b"Photoshop 3.0\x008BIM" + SCANS), behind=SCANS),
        jpeg_with(*[(0xEB, b"x" * 65_000)] * 300, behind=encoded(gradient(), "JPEG") + b"ftypmp42" + LONG),
        jpeg_with((0xE2, MPF), behind=encoded(gradient(), "JPEG")),
        jpeg_with(
            (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x0f\0\2\xff\xff\xff\xff\xff\xff\xff\xff\x01\x12\0\3\0\0\0\1\0\1\0\0")
        ),
        jpeg_with((0xE1, b"Exif\0\0nonsense"), (0xE1, b"Exif\0\0more"), (0xE2, b"ICC_PROFILE\0\1\3abc")),
        encoded(gradient(), "JPEG", progressive=True),
        png_with((b"gAMA", b"\0\0\xb1\x8f")).replace(b"gAMA\0\0\xb1\x8f", b"gAMA\0\0\xb1\x90"),
        png_with(*[(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b" " * 1_000_000))] * 80),
        jpeg_with(behind=b"\0\2" + b"\xff\xda\0\2" * 500),
    ],
    ids=[
        "long packed text",
        "long text",
        "long packed XMP",
        "long XMP",
        "long profile",
        "too long profile",
        "profile of another packing",
        "broken text",
        "private chunks and a trailer",
        "broken EXIF",
        "wrong checksum of what is not needed",
        "previews and a trailer that look like scans",
        "19 MB of segments and a film",
        "a preview index without its previews",
        "a tag that lies about its place",
        "nonsense for EXIF and half a profile",
        "progressive",
        "wrong checksum of what says how to show it",
        "more texts than Pillow unpacks together",
        "a trailer that looks like segments",
    ],
)
def test_what_lies_around_a_picture_is_not_held_against_it(data: bytes) -> None:
    found = decode(data).stored
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(gradient(), dtype=int)).mean() < 4


def test_a_text_says_which_side_is_up_and_a_long_one_does_not_hide_it() -> None:
    turned = b'<x:xmpmeta tiff:Orientation="6"/>'
    for chunk in (
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + turned),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(turned)),
        (b"eXIf", TURNED.tobytes()[6:]),
    ):
        comments = [(b"zTXt", b"Comment\0\0" + zlib.compress(LONG))] * 20
        assert decode(png_with(*comments, chunk)).stored.size == (30, 40)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (jpeg_with(*[(0xE1, b"Exif\0\0x")] * 300), "segments"),
        (jpeg_with(*[(0xFE, b"")] * 5000), "segments"),
        (b"\xff\xd8\xff" + b"\0" * (1 << 20), "holds no picture"),
        (jpeg_with()[:200], "holds no picture"),
        (jpeg_with()[:20] + (b"\0" * 60_000 + b"\xff\xfe\0\2") * 20 + jpeg_with()[20:], "holds no picture"),
        (jpeg_with().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "3 channels of 12 bits"),
        (jpeg_with().replace(b"\0\x1e\0\x28\3", b"\0\x1e\0\x28\2"), "2 channels of 8 bits"),
        (
            jpeg_with()
            .replace(b"\0\x1e\0\x28\3", b"\x3f\xff\x3f\xff\3")
            .replace(b"\xff\xda", b"\xff\xda\0\2" * 25 + b"\xff\xda"),
            "more than 20 scans",
        ),
        (png_with(*[(b"prVt", b"")] * 140_000), "chunks"),
    ],
    ids=[
        "EXIF many times",
        "comments",
        "filler",
        "a head",
        "filler in parts",
        "12 bits",
        "2 channels",
        "some scans of a large picture",
        "chunks",
    ],
)
def test_what_only_costs_time_is_refused_for_what_it_is(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableImage, match=reason) as refused:
        decode(data)
    assert "Error" not in str(refused.value)


def test_a_tiff_may_hold_its_picture_in_smaller_sizes_and_no_other_picture() -> None:
    def pages(subfile: int) -> bytes:
        out = io.BytesIO()
        small = gradient(size=(20, 15))
        small.encoderinfo = {"tiffinfo": {254: subfile}}
        gradient().save(out, "TIFF", save_all=True, append_images=[small])
        return out.getvalue()

    assert decode(pages(1)).stored.tobytes() == gradient().tobytes()
    with pytest.raises(UndecodableImage, match="several pages"):
        decode(pages(0))


def test_an_animation_of_one_frame_is_a_picture() -> None:
    control = struct.pack(">IIIIIHHBB", 0, 40, 30, 0, 0, 1, 10, 0, 0)
    assert decode(png_with((b"acTL", struct.pack(">II", 1, 0)), (b"fcTL", control))).stored.tobytes() == gradient().tobytes()
    out = io.BytesIO()
    gradient().save(out, "PNG", save_all=True, append_images=[gradient("L").convert("RGB")])
    with pytest.raises(UndecodableImage, match="animated"):
        decode(out.getvalue())


APPLE_RGB = matrix_profile((0.3127, 0.329, 0.625, 0.34, 0.28, 0.595, 0.155, 0.07), 1.8)
DISPLAY_P3 = matrix_profile((0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06), 2.2)
PRO_PHOTO = matrix_profile((0.3457, 0.3585, 0.7347, 0.2653, 0.1596, 0.8404, 0.0366, 0.0001), 1.8)


def _linear(primaries: tuple[float, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The matrix from linear colours of these primaries (white D65) to XYZ."""
    white, *colours = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(primaries[::2], primaries[1::2], strict=True))
    matrix = np.stack(colours, axis=1)
    found: np.ndarray[Any, np.dtype[np.float64]] = matrix * np.linalg.solve(matrix, white)
    return found


def test_colours_become_srgb_as_their_definition_says() -> None:
    """Against the definition of sRGB (IEC 61966-2-1), computed here; inside its gamut and to a grey level."""
    colours = np.asarray(gradient(), dtype=np.float64) / 4 + 80
    apple = _linear((0.3127, 0.329, 0.625, 0.34, 0.28, 0.595, 0.155, 0.07))
    srgb = _linear((0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06))
    stored = Image.fromarray(colours.astype(np.uint8))
    linear = ((np.asarray(stored) / 255) ** (round(1.8 * 256) / 256)) @ (np.linalg.inv(srgb) @ apple).T
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.abs(linear) ** (1 / 2.4) - 0.055) * 255
    found = decode(encoded(stored, icc_profile=APPLE_RGB))
    assert np.abs(np.asarray(found.srgb()) - expected).max() < 1.5
    assert np.abs(np.asarray(found.srgb(), dtype=int) - np.asarray(stored, dtype=int)).max() > 8
    contract = SQUARE.model_copy(update={"colour": "as stored"})
    assert pixel_digest(found) == pixel_digest(decode(encoded(stored)))
    assert (prepare(found, contract) == prepare(decode(encoded(stored)), contract)).all()
    assert (prepare(found, SQUARE) == prepare(Picture(found.srgb()), SQUARE)).all()


ADOBE_RGB_MARK = (
    b"MM\0*\0\0\0\x08\0\1\x87\x69\0\4\0\0\0\1\0\0\0\x1a\0\0\0\0"
    b"\0\1\xa0\x05\0\4\0\0\0\1\0\0\0\x2c\0\0\0\0\0\1\0\1\0\2\0\0\0\4R03\0\0\0\0\0"
)
"""EXIF of a camera that is set to Adobe RGB."""
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@pytest.mark.parametrize(
    ("data", "changed", "problem"),
    [
        (encoded(gradient(), "JPEG", icc_profile=DISPLAY_P3), True, ""),
        (encoded(gradient(), "WEBP", icc_profile=PRO_PHOTO, lossless=True), True, ""),
        (encoded(gradient(), "TIFF", icc_profile=PRO_PHOTO), True, ""),
        (encoded(gradient("P"), icc_profile=PRO_PHOTO), True, ""),
        (encoded(gradient("RGBA"), icc_profile=PRO_PHOTO), True, ""),
        (png_with((b"gAMA", struct.pack(">I", 100_000))), True, ""),
        (png_with((b"gAMA", struct.pack(">I", 100_000)), image=gradient("L")), True, ""),
        (jpeg_with((0xE1, b"Exif\0\0" + ADOBE_RGB_MARK)), True, ""),
        (encoded(gradient(), icc_profile=SRGB), False, ""),
        (encoded(gradient()), False, ""),
        (png_with((b"gAMA", struct.pack(">I", 45_455))), False, ""),
        (png_with((b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100_000))), False, ""),
        (png_with((b"cHRM", b"\0" * 32), (b"gAMA", struct.pack(">I", 100_000))), False, "no colours"),
        (encoded(gradient("L"), icc_profile=PRO_PHOTO), False, "is for RGB pixels and it holds grey ones"),
        (encoded(gradient("CMYK"), "JPEG", icc_profile=PRO_PHOTO), False, "is for RGB pixels and it holds CMYK ones"),
        (encoded(gradient(), icc_profile=LAB), False, "not one of a picture"),
        (encoded(gradient(), icc_profile=PRO_PHOTO[:200]), False, "is broken"),
        (encoded(gradient(), icc_profile=b"no profile"), False, "is broken"),
        (jpeg_with((0xE2, b"ICC_PROFILE\0\1\3abc")), False, "do not fit"),
        (png_with((b"iCCP", b"p\0\0" + zlib.compress(b"x" * (9 << 20)))), False, "larger than"),
        (encoded(gradient(), "TIFF", icc_profile=PRO_PHOTO + bytes(8 << 20)), False, "larger than"),
        (png_with((b"iCCP", b"p\0\0" + zlib.compress(PRO_PHOTO))).replace(b"iCCPp", b"iCCPq"), False, "is broken"),
        (png_with(behind=png_with((b"iCCP", b"p\0\0" + zlib.compress(PRO_PHOTO)))[33:]), False, ""),
        (png_with((b"gAMA", b"\0\0\0\1")), False, "its gamma is 1e-05"),
        (jpeg_with((0xE1, b"Exif\0\0" + ADOBE_RGB_MARK), image=gradient("L")), False, ""),
        (jpeg_with((0xE1, b"Exif\0\0" + ADOBE_RGB_MARK[:26] + b"\xff" * 8 + b"R03")), False, ""),
    ],
)
def test_a_profile_counts_where_it_fits_and_is_else_ignored_with_a_reason(data: bytes, changed: bool, problem: str) -> None:
    found = decode(data)
    assert (found.original is not None) == changed
    assert (found.srgb().tobytes() != found.stored.tobytes()) == changed
    assert found.srgb().mode == found.stored.mode
    assert found.conversion.problem if problem else not found.conversion.problem
    assert re.search(problem, found.conversion.problem)


def test_threads_share_a_conversion_and_agree_to_the_bit() -> None:
    files = [encoded(gradient(size=(40 + n, 30)), icc_profile=(APPLE_RGB, PRO_PHOTO)[n % 2]) for n in range(40)]
    expected = [decode(data).srgb().tobytes() for data in files]
    assert list(in_threads(lambda data: decode(data).srgb().tobytes(), files, workers=8)) == expected


def printing_profile() -> bytes:
    """CMYK of an ideal printer: lightness falls with every ink, and there is no other colour than grey."""
    clut = bytes(
        value
        for inks in itertools.product((0, 1), repeat=4)
        for value in (round(255 * (1 - sum(inks[:3]) / 3) * (1 - inks[3])), 128, 128)
    )
    ramp = bytes(range(256))
    table = struct.pack(">4sIBBBB9i", b"mft1", 0, 4, 3, 2, 0, *(65536 * (n % 4 == 0) for n in range(9)))
    table += ramp * 4 + clut + ramp * 3
    header = struct.pack(">I4sI4s4s4s", 144 + len(table), b"\0\0\0\0", 0x02100000, b"prtr", b"CMYK", b"Lab ")
    header = (header + b"\0" * 12 + b"acsp" + b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0")
    return header + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


def test_inks_become_the_colours_that_their_profile_says() -> None:
    inks = Image.new("CMYK", (8, 8), (0, 0, 0, 128))
    found = decode(encoded(inks, "TIFF", icc_profile=printing_profile()))
    assert found.conversion.problem == ""
    # Half the ink is half the lightness, which is a level of 119 in sRGB.
    assert found.srgb().getpixel((4, 4)) == pytest.approx((119, 119, 119), abs=2)
    assert found.stored.getpixel((4, 4)) == (127, 127, 127)


def test_a_large_picture_is_converted_as_a_small_one_is() -> None:
    tall = Image.fromarray(np.random.default_rng(3).integers(0, 255, (600, 20, 4), dtype=np.uint8))
    whole = decode(encoded(tall, icc_profile=APPLE_RGB))
    part = decode(encoded(tall.crop((0, 300, 20, 400)), icc_profile=APPLE_RGB))
    white = Image.alpha_composite(Image.new("RGBA", tall.size, (255, 255, 255, 255)), tall).convert("RGB")
    assert whole.stored.tobytes() == white.tobytes()
    assert whole.srgb().crop((0, 300, 20, 400)).tobytes() == part.srgb().tobytes()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("subsampled", "794f57052b0c984d62340ad61df2a2fd7ebc388900ca6d057ba36ab11aaa8ae7"),
        ("progressive", "c9a4f36f6aa2e397eba8d85b41885b174267f03ad1e4d6f29d1052702e7c0ed8"),
    ],
)
def test_a_jpeg_decodes_to_the_bits_that_frozen_ledgers_are_keyed_by(name: str, expected: str) -> None:
    """Its sides are no multiples of 16 and its colours are subsampled: that is where decoders differ."""
    found = pixel_digest(decode((Path(__file__).parent / f"{name}.golden.jpg").read_bytes()))
    assert found == expected, (
        "Pillow or its libjpeg decodes to other pixels than before. Every test ledger is keyed by pixels: with this lock, "
        "pictures of frozen test sets would be taken for new ones and could train. Keep the Pillow of the old lock. If it has "
        "to go, ledgers need the new digests beside the old ones first; do not just write the new digest here."
    )
