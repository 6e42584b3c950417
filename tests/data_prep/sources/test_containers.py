"""Every file format that Pillow writes gives the stored pixels, or is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, features

from data_prep.images import BadFile, decode_rgb, read_header, read_index_map
from data_prep.packing.shard_plan import _entry
from data_prep.sources.files import Sample

RANDOM = np.random.default_rng(18)
PHOTO = RANDOM.integers(0, 256, (13, 7, 3), np.uint8)
LABELS = RANDOM.integers(0, 256, (13, 7), np.uint8)
ORIENTATION = 0x0112
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="{}"/></x:xmpmeta>'


@pytest.fixture
def file(tmp_path):
    return tmp_path / "name.png"  # the suffix says nothing


def oriented(orientation: int, by: str) -> dict[str, object]:
    if by == "xmp":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[700] = XMP.format(orientation).encode()
        tags.tagtype[700] = 1
        return {"tiffinfo": tags}
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return {"exif": exif}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("container", "by", "save"),
    [
        ("TIFF", "exif", {}),
        ("TIFF", "exif", {"compression": "tiff_lzw"}),
        ("TIFF", "xmp", {}),
        ("PNG", "exif", {}),
        ("WEBP", "exif", {"lossless": True}),
        ("JPEG", "exif", {"quality": 95}),
    ],
)
def test_an_orientation_turns_neither_images_nor_label_maps(file, container, by, save, orientation):
    options = {**save, **oriented(orientation, by)}
    Image.fromarray(PHOTO).save(file, container, **options)
    found = decode_rgb(file.read_bytes(), "name")
    header = read_header(file)
    assert found.shape == PHOTO.shape == (header.height, header.width, 3)
    if container == "JPEG":
        Image.fromarray(PHOTO).save(file, container, **save)
        np.testing.assert_array_equal(found, np.asarray(Image.open(file)))
        return
    np.testing.assert_array_equal(found, PHOTO)
    if container == "WEBP":
        return
    for mode in ("L", "P"):
        image = Image.fromarray(LABELS, "L")
        if mode == "P":
            image.putpalette(RANDOM.integers(0, 256, 768, np.uint8).tobytes())
        image.save(file, container, **options)
        np.testing.assert_array_equal(read_index_map(file), LABELS)


KEPT = [
    ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}), ("TIFF", {"compression": "packbits"}),
    ("TIFF", {"compression": "lzma"}), ("TIFF", {"compression": "zstd"}),
]  # fmt: skip
ALTERED = [
    ("JPEG", {}, "JPEG does not keep label values; save label maps as PNG"),
    ("MPO", {"save_all": True, "append_images": [Image.fromarray(LABELS)]}, "MPO does not keep"),
    ("TIFF", {"compression": "jpeg"}, "TIFF with jpeg compression does not keep"),
    ("WEBP", {}, "WEBP does not keep"),
    ("WEBP", {"lossless": True}, "WEBP does not keep"),
    ("JPEG2000", {"irreversible": True}, "cannot be read as an image (no known image format)"),
    ("AVIF", {}, "cannot be read as an image (no known image format)"),
    ("GIF", {}, "cannot be read as an image (no known image format)"),
    ("TIFF", {"save_all": True, "append_images": [Image.fromarray(LABELS)]}, "holds 2 images"),
    ("PNG", {"save_all": True, "append_images": [Image.fromarray(LABELS + 1)]}, "holds 2 images"),
]  # fmt: skip


@pytest.mark.parametrize(("container", "save"), KEPT)
def test_a_label_map_in_a_lossless_container_keeps_its_values(file, container, save):
    Image.fromarray(LABELS).save(file, container, **save)
    np.testing.assert_array_equal(read_index_map(file), LABELS)


@pytest.mark.parametrize(("container", "save", "message"), ALTERED)
def test_a_label_map_in_any_other_container_is_refused(file, container, save, message):
    needs = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}.get(container)
    if needs and not features.check(needs):
        pytest.skip(f"this Pillow has no {container}")
    Image.fromarray(LABELS).save(file, container, **save)
    with pytest.raises(BadFile) as refused:
        read_index_map(file)
    assert str(refused.value).startswith(str(file)) and message in str(refused.value)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("container", "save", "codec"),
    [
        ("JPEG", {}, "encoded"),
        ("MPO", {"save_all": True, "append_images": [Image.fromarray(LABELS)]}, "raw"),
        ("TIFF", {"compression": "jpeg"}, "raw"),
        ("WEBP", {}, "raw"),
        ("PNG", {}, "raw"),
    ],
)  # fmt: skip
def test_only_plain_jpeg_files_keep_their_bytes_and_all_decode_to_their_first_image(
    file, mode, container, save, codec
):
    Image.fromarray(PHOTO).convert(mode).save(file, container, **save)
    assert _entry(Sample("name", file, file), "auto").codec == codec
    found = decode_rgb(file.read_bytes(), "name")
    np.testing.assert_array_equal(found, np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.parametrize(("bits", "greys"), [(8, (0, 255)), (8, range(9)), (1, (0, 255))])
def test_a_grey_bmp_is_read_as_its_bits_say_or_refused(file, bits, greys):
    indices = LABELS[:, :4] % len(greys)  # of a width whose rows take 4 bytes with 1 and 8 bits
    if bits == 1:
        rows = b"".join(np.packbits(row).tobytes() + bytes(3) for row in indices[::-1])
    else:
        rows = indices[::-1].tobytes()
    palette = b"".join(bytes([grey, grey, grey, 0]) for grey in greys)
    begin = 14 + 40 + len(palette)
    sizes = (40, 4, 13, 1, bits, 0, len(rows), 0, 0, len(greys), len(greys))
    head = b"BM" + struct.pack("<IHHI", begin + len(rows), 0, 0, begin)
    file.write_bytes(head + struct.pack("<IiiHHIIiiII", *sizes) + palette + rows)
    if (bits, len(greys)) == (8, 2):
        with pytest.raises(
            BadFile, match="is a grey BMP of 8 bits per pixel, which is not supported; save it as"
        ):
            decode_rgb(file.read_bytes(), "name")
    else:
        found = decode_rgb(file.read_bytes(), "name")
        np.testing.assert_array_equal(found[..., 0], np.array(greys, np.uint8)[indices])
