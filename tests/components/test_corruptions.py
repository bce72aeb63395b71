"""Each corruption against what it says of itself, computed another way."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from components.contracts.errors import UnknownName
from components.corruptions import CLEAN, CORRUPTED, CORRUPTIONS, VARIANTS, changed, severities

SHAPES = [(8, 8, 1), (8, 8, 3), (28, 28, 1), (72, 56, 3)]
DIGESTS = [f"{i:032x}" for i in range(4)]


def pictures(shape: tuple[int, int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Four pictures of edges, a gradient and some grain, none of them black or white."""
    height, width, channels = shape
    y, x = np.mgrid[:height, :width] / min(height, width)
    grain = np.random.default_rng(1).normal(0, 6, (4, *shape))
    edges = np.where((x[None] + np.arange(4)[:, None, None] / 7) % 0.5 < 0.25, 60, 180)
    tint = np.arange(channels) * 15
    found: np.ndarray[Any, np.dtype[np.uint8]] = np.clip(
        edges[..., None] + 40 * y[None, ..., None] + tint + grain, 20, 240
    ).astype(np.uint8)
    return found


def distance(one: Any, other: Any) -> float:
    return float(np.sqrt(((one.astype(float) - other) ** 2).mean()))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_variant_keeps_the_shape_and_depends_on_the_picture_and_its_digest_alone(shape: Any) -> None:
    given = pictures(shape)
    given.setflags(write=False)  # as Pillow gives them
    before = given.copy()
    for variant in VARIANTS:
        found = changed(given, variant, DIGESTS)
        assert found.dtype == np.uint8
        assert found.shape == given.shape
        assert np.array_equal(given, before)
        # In another batch, order and process-wide state it is the same.
        np.random.seed(len(variant))
        alone = np.concatenate([changed(given[i : i + 1], variant, DIGESTS[i : i + 1]) for i in (3, 1, 0, 2)])
        assert np.array_equal(alone, found[[3, 1, 0, 2]]), variant
        assert np.array_equal(found, given) == (variant == CLEAN), variant


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_stronger_severity_changes_more(corruption: str, shape: Any) -> None:
    given = pictures(shape)
    weak, strong = (distance(changed(given, variant, DIGESTS), given) for variant in severities(corruption))
    assert 0 < weak < strong


def test_noise_has_the_deviation_of_imagenet_c_and_is_another_for_each_picture() -> None:
    grey = np.full((4, 64, 64, 3), 128, dtype=np.uint8)
    for variant, sigma in zip(severities("noise"), (0.08, 0.18), strict=True):
        noise = changed(grey, variant, DIGESTS).astype(float) - 128
        assert noise.std() == pytest.approx(255 * sigma, rel=0.03)
        assert abs(noise.mean()) < 1
        alike = np.corrcoef(noise.transpose(0, 3, 1, 2).reshape(12, -1))
        assert np.abs(alike - np.eye(12)).max() < 0.1
    assert not np.array_equal(changed(grey, "noise-1", DIGESTS), changed(grey, "noise-1", DIGESTS[::-1]))


@pytest.mark.parametrize(("side", "sigmas"), [(224, (1.55, 3.06)), (32, (0.454, 0.738))])
def test_defocus_blur_is_a_gaussian_that_grows_with_the_picture(side: int, sigmas: tuple[float, float]) -> None:
    given = pictures((side, side + 10, 3))
    for variant, sigma in zip(severities("defocus_blur"), sigmas, strict=True):
        wanted = given.astype(float)
        for axis in (1, 2):
            wanted = gaussian_filter1d(wanted, sigma, axis=axis, mode="mirror", radius=int(np.ceil(3 * sigma)))
        assert np.abs(changed(given, variant, DIGESTS) - wanted).max() < 1.0


def test_darkness_takes_light_by_stops_and_low_contrast_leaves_the_mean() -> None:
    given = pictures((64, 64, 1))
    for variant, stops in zip(severities("darkness"), (1, 3), strict=True):
        light = (changed(given, variant, DIGESTS) / 255.0) ** 2.2
        assert light.sum() / ((given / 255.0) ** 2.2).sum() == pytest.approx(0.5**stops, rel=0.05)
    for variant, left in zip(severities("low_contrast"), (0.4, 0.2), strict=True):
        found = changed(given, variant, DIGESTS).astype(float)
        for one, before in zip(found, given.astype(float), strict=True):
            assert one.mean() == pytest.approx(before.mean(), abs=1)
            assert one.std() == pytest.approx(left * before.std(), rel=0.03)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_another_encoder(channels: int) -> None:
    given = pictures((72, 56, channels))
    for variant, quality in (("jpeg-1", 25), ("jpeg-3", 15), ("reencoding", 90)):
        for one, found in zip(given, changed(given, variant, DIGESTS), strict=True):
            _, encoded = cv2.imencode(".jpg", one[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
            decoded: Any = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
            wanted = decoded.reshape(one.shape)[..., ::-1]
            assert np.abs(wanted.astype(float) - found).mean() < 1
            assert np.abs(wanted.astype(float) - one).mean() > 1


def test_a_flip_mirrors_and_a_shift_moves_by_a_few_per_cent_either_way() -> None:
    given = pictures((72, 56, 3))
    assert np.array_equal(changed(given, "flip", DIGESTS)[:, :, 0], given[:, :, -1])
    many = np.repeat(given[:1], 40, axis=0)
    ways = set()
    for found in changed(many, "shift", [str(i) for i in range(40)]):
        inner = found[3:-3, 2:-2]
        moved = {
            (down, right): np.array_equal(inner, np.roll(given[0], (down, right), (0, 1))[3:-3, 2:-2])
            for down in (-3, 3)
            for right in (-2, 2)
        }
        assert sum(moved.values()) == 1
        ways |= {way for way, is_moved in moved.items() if is_moved}
    assert len(ways) == 4
    # A picture of 8 pixels moves by one of them.
    assert distance(changed(pictures((8, 8, 1)), "shift", DIGESTS), pictures((8, 8, 1))) > 0


def test_what_are_no_prepared_pictures_is_refused() -> None:
    given = pictures((8, 8, 3))
    with pytest.raises(UnknownName, match="unknown variant of pictures 'fog-1'; valid: clean, .*noise-1"):
        changed(given, "fog-1", DIGESTS)
    wrong: list[Any] = [given.astype(np.float32), given[0], given[..., :2]]
    for pixels in wrong:
        with pytest.raises(ValueError, match="expected uint8 pictures"):
            changed(pixels, CORRUPTED[0], DIGESTS)
    with pytest.raises(ValueError, match="and n digests"):
        changed(given, CORRUPTED[0], DIGESTS[:3])
