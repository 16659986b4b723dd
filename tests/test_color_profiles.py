"""Images of other color spaces become sRGB."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms
from test_data import gradient, jpeg, pixels, write_folder
from tiny import encoded

from sitlib.data import images, open_images

# X, Y, Z of red, green and blue under D50, as the profiles of these names have them
SRGB = [[0.4361, 0.2225, 0.0139], [0.3851, 0.7169, 0.0971], [0.1431, 0.0606, 0.7139]]
DISPLAY_P3 = [[0.5151, 0.2412, -0.0011], [0.2920, 0.6922, 0.0419], [0.1571, 0.0666, 0.7841]]
ADOBE_RGB = [[0.6097, 0.3111, 0.0195], [0.2053, 0.6257, 0.0609], [0.1492, 0.0632, 0.7446]]


def profile(primaries=SRGB, gamma=None, space=b"RGB ") -> bytes:
    """The sRGB profile of LittleCMS with other primaries and another curve, or one of a grey."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    content[16:20] = space
    for entry in range(132, 132 + 12 * int.from_bytes(content[128:132]), 12):
        tag, offset = struct.unpack_from(">4si", content, entry)
        if tag[1:] == b"XYZ":
            values = [round(value * 2**16) for value in primaries[b"rgb".index(tag[0])]]
            struct.pack_into(">3i", content, offset + 8, *values)
        if tag[1:] == b"TRC" and gamma:
            struct.pack_into(">hhi", content, offset + 8, 0, 0, round(gamma * 2**16))
        if tag == b"rTRC" and space == b"GRAY":
            content[entry : entry + 4] = b"kTRC"
    return bytes(content)


def in_srgb(colors: np.ndarray, primaries=SRGB, gamma=None) -> np.ndarray:
    """The colors of `profile(primaries, gamma)` in sRGB, 0..255, in float64 by the formulas."""
    values = colors / 255
    curve = np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)
    linear = values**gamma if gamma else curve
    linear = (linear @ np.array(primaries) @ np.linalg.inv(SRGB)).clip(0, 1)
    curve = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return 255 * curve


class TestColorProfiles:
    @pytest.mark.parametrize(
        "space", [(DISPLAY_P3,), (ADOBE_RGB, 563 / 256)], ids=["Display P3", "Adobe RGB"]
    )
    def test_rgb(self, space, recwarn):
        of_srgb = encoded(gradient(), icc_profile=profile())
        assert np.array_equal(pixels(of_srgb), gradient()) and not recwarn.list
        image, about = Image.fromarray(gradient()), {"icc_profile": profile(*space)}
        expected = in_srgb(gradient(), *space)
        assert np.abs(expected - gradient()).max() > 20
        assert np.abs(pixels(encoded(image, **about)) - expected).max() < 2
        assert np.abs(pixels(encoded(image, "WEBP", lossless=True, **about)) - expected).max() < 2
        palette = image.quantize(16)
        colors = in_srgb(np.asarray(palette.convert("RGB")), *space)
        assert np.abs(pixels(encoded(palette, **about)) - colors).max() < 2
        image.putalpha(100)  # colors are converted before they are mixed with white
        mixed = 255 + (expected - 255) * 100 / 255
        assert np.abs(pixels(encoded(image, **about)) - mixed).max() < 2

    def test_grey(self):
        values = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)
        expected = in_srgb(values[..., None].repeat(3, 2), gamma=1.8)
        about = {"icc_profile": profile(gamma=1.8, space=b"GRAY")}
        for image in (Image.fromarray(values), Image.fromarray(values.astype(np.uint16) * 257)):
            assert np.abs(pixels(encoded(image, **about)) - expected).max() < 2
        of_rgb = encoded(Image.fromarray(values), icc_profile=profile(gamma=1.8))
        assert np.abs(pixels(of_rgb) - expected).max() < 2

    def test_cmyk(self):
        """A profile of a table: the Lab colors of no ink and of all ink, for each of four inks."""
        rng = np.random.default_rng(0)
        table = rng.integers([60, 100, 100], [220, 156, 156], (16, 3), dtype=np.uint8)
        table[0] = 255, 128, 128  # no ink is white
        identity, ramp = struct.pack(">9i", *(2**16 * np.eye(3, dtype=int)).flat), bytes(range(256))
        lut = b"mft1" + bytes([0, 0, 0, 0, 4, 3, 2, 0]) + identity
        lut += 4 * ramp + table.tobytes() + 3 * ramp
        header = bytearray(profile()[:128])
        header[12:24] = b"prtrCMYKLab "
        content = header + struct.pack(">i4sii", 1, b"A2B0", 128 + 4 + 12, len(lut)) + lut
        struct.pack_into(">i", content, 0, len(content))
        ink = np.array(list(np.ndindex(2, 2, 2, 2)), np.uint8).reshape(4, 4, 4) * 255
        image = Image.fromarray(ink.repeat(4, 0).repeat(4, 1), "CMYK")
        lab = (table.astype(int) - [0, 128, 128]).astype(np.int8).view(np.uint8)
        lab = Image.fromarray(lab.reshape(4, 4, 3), "LAB")
        spaces = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        expected = np.asarray(ImageCms.profileToProfile(lab, *spaces, outputMode="RGB"))
        found = pixels(encoded(image, "TIFF", icc_profile=bytes(content)))[::4, ::4]
        assert np.abs(found.astype(int) - expected).max() <= 3

    @pytest.mark.parametrize("content", [b"none", profile()[:300], profile(space=b"CMYK")])
    def test_a_broken_one_is_ignored_with_a_warning(self, content):
        image = encoded(gradient(), icc_profile=content)
        with pytest.warns(UserWarning, match="color profile is broken"):
            assert np.array_equal(pixels(image), gradient())

    def test_broken_ones_are_counted(self, tmp_path, monkeypatch):
        root = write_folder(tmp_path, ["train"], colors=("red",))
        for number in (1, 3):
            (root / f"train/red/{number}.jpg").write_bytes(jpeg("red", icc_profile=b"none"))
        message = r"2 of 6 images .* have broken color profiles: .*1\.jpg; .*3\.jpg"
        with pytest.warns(UserWarning, match=message):
            assert len(open_images(root)) == 6
        monkeypatch.setattr(images, "DECODE_AT_OPENING", 3)
        with pytest.warns(UserWarning, match="has images with broken color profiles"):
            assert open_images(root)[3].key == "train/red/3.jpg"
