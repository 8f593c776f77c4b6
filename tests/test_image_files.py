"""Folders of images: what is listed, how it is decoded, and what happens to broken files."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from temi import image_files, plots
from temi.backbones import load_backbone
from temi.cache import embed
from temi.data import load_images
from temi.extraction import _Batches
from temi.files import write_json
from temi.gallery import write_gallery
from temi.image_files import (
    ImageFiles,
    UnreadableImageError,
    decode,
    list_images,
    readable_name,
)

RED, GREY = (255, 0, 0), 128


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """A PNG file written by hand."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


def red(mode: str = "RGB", size=(6, 4)) -> Image.Image:
    return Image.new("RGB", size, RED).convert(mode)


def half_clear() -> Image.Image:
    """Left half opaque red, right half transparent black."""
    image = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 3, 4))
    return image


def animation() -> bytes:
    frames = [Image.new("RGB", (6, 4), color) for color in (RED, "blue", "green")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def upside() -> bytes:
    """Stored lying on its side; the camera says how to turn it."""
    image = Image.new("RGB", (6, 4), "blue")
    image.paste(RED, (0, 0, 1, 4))  # the left edge; turned clockwise, the upper one
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image, "PNG", exif=exif)


NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
JPEG = saved(Image.fromarray(NOISE), "JPEG")
SIXTEEN = b"".join(b"\0" + struct.pack(">6H", *[32896] * 6) for _ in range(4))  # 128 * 257
FLOATS = Image.fromarray(np.linspace(-2, 5, 24, dtype=np.float32).reshape(4, 6))

CONVERTED = {  # name -> content, expected shape, expected upper left pixel
    "plain.jpg": (saved(red(), "JPEG", quality=95), (4, 6, 3), RED),
    "UPPER.JPG": (saved(red(), "JPEG", quality=95), (4, 6, 3), RED),
    "grey.png": (saved(Image.new("L", (6, 4), GREY), "PNG"), (4, 6), GREY),
    "bilevel.png": (saved(Image.new("1", (6, 4), 1), "PNG"), (4, 6), 255),
    "palette.png": (saved(red("P"), "PNG"), (4, 6, 3), RED),
    "palette.gif": (saved(red("P"), "GIF"), (4, 6, 3), RED),
    "alpha.png": (saved(half_clear(), "PNG"), (4, 6, 3), RED),
    "alpha.webp": (saved(half_clear(), "WEBP", lossless=True), (4, 6, 3), RED),
    "clear.png": (saved(Image.new("RGBA", (6, 4), (*RED, 0)), "PNG"), (4, 6, 3), (255,) * 3),
    "grey_alpha.png": (saved(Image.new("LA", (6, 4), (0, 0)), "PNG"), (4, 6), 255),
    "cmyk.jpg": (saved(red("CMYK"), "JPEG", quality=95), (4, 6, 3), RED),
    "cmyk.tif": (saved(red("CMYK"), "TIFF"), (4, 6, 3), RED),
    "lab.tiff": (saved(Image.new("LAB", (6, 4), (255, 128, 128)), "TIFF"), (4, 6, 3), (255,) * 3),
    "sixteen.png": (png(6, 4, 16, 0, SIXTEEN), (4, 6), GREY),
    "sixteen.tif": (saved(Image.new("I;16", (6, 4), 65535), "TIFF"), (4, 6), 255),
    "damaged_exif.png": (saved(red(), "PNG", exif=b"Exif\0\0no TIFF"), (4, 6, 3), RED),
    "damaged_exif.webp": (saved(red(), "WEBP", lossless=True, exif=b"no TIFF"), (4, 6, 3), RED),
    "sixteen_in_32.tif": (saved(Image.new("I", (6, 4), 32896), "TIFF"), (4, 6), GREY),
    "animated.gif": (animation(), (4, 6, 3), RED),
    "turned.png": (upside(), (6, 4, 3), RED),
    "one_pixel.bmp": (saved(red(size=(1, 1)), "BMP"), (1, 1, 3), RED),
    "jpeg_called.png": (saved(red(), "JPEG", quality=95), (4, 6, 3), RED),
    "new\nline, and 'quotes\".png": (saved(red(), "PNG"), (4, 6, 3), RED),
    os.fsdecode(b"latin-\xe9.png"): (saved(red(), "PNG"), (4, 6, 3), RED),
    r"latin-\xe9.png": (saved(red(), "PNG"), (4, 6, 3), RED),
    "\u65e5\u672c.png": (saved(red(), "PNG"), (4, 6, 3), RED),
}
REPORTED = {  # name -> content, words of the reason
    "empty.jpg": (b"", "an empty file"),
    "text.jpg": (b"this is no picture", "not an image in a known format"),
    "zeros.png": (bytes(1000), "not an image in a known format"),
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated.png": (saved(red(size=(64, 64)), "PNG")[:80], "broken"),
    "header_only.png": (png(6, 4, 8, 0, b"")[:33], "not an image in a known format"),
    "bad_content.png": (png(6, 4, 8, 0, bytes(28)).replace(b"IDATx", b"IDATy"), "broken"),
    "bomb.png": (png(20_000, 20_000, 1, 0, bytes(2501 * 20)), "too large: more than 178 million"),
    "float.tif": (saved(FLOATS, "TIFF"), "32-bit values"),
    "whole_32.tif": (saved(Image.new("I", (6, 4), 10**6), "TIFF"), "32-bit values"),
    "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image in a known format"),
}
LINKS = {"loop.png": "loop.png", "dangling.png": "nowhere.png"}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Odd and broken files among ten good ones, a pipe, a loop of links, a folder x.jpg."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(10):
        Image.new("RGB", (6, 4), (number, 100, 200)).save(root / f"good{number}.png")
    for name, (content, *_) in (CONVERTED | REPORTED).items():
        (root / name).write_bytes(content)
    for name, target in LINKS.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe.png")
    (root / "folder.jpg").mkdir()
    (root / "folder.jpg" / "inside.png").write_bytes(saved(red(), "PNG"))
    (root / ".hidden.png").write_bytes(saved(red(), "PNG"))
    (root / "notes.txt").write_text("not an image, and not meant as one")
    (root / "round").symlink_to(root, target_is_directory=True)
    return root


def test_there_are_thirty_of_them():
    assert len(CONVERTED) + len(REPORTED) + len(LINKS) + 2 >= 30


@pytest.mark.parametrize("name", CONVERTED, ids=readable_name)
def test_converted(hostile, name):
    _, shape, pixel = CONVERTED[name]
    picture = decode(str(hostile / name))
    assert picture.dtype == np.uint8
    assert picture.shape == shape
    np.testing.assert_allclose(picture[0, 0].astype(int), pixel, atol=2)


@pytest.mark.parametrize("name", [*REPORTED, *LINKS, "pipe.png", "gone.png"])
def test_reported(hostile, name):
    words = {"loop.png": "levels of symbolic links", "dangling.png": "No such file"}
    words |= {"pipe.png": "not a file", "gone.png": "No such file"}
    words |= {name: reason for name, (_, reason) in REPORTED.items()}
    with pytest.raises(UnreadableImageError) as error:
        decode(str(hostile / name))
    assert words[name] in error.value.reason
    assert "\n" not in error.value.reason
    assert str(hostile) not in error.value.reason


def photograph(mode: str = "RGB") -> Image.Image:
    """A smooth picture of 1400 x 1000 pixels."""
    coarse = np.random.default_rng(1).integers(0, 255, (10, 14, 3), np.uint8)
    return Image.fromarray(coarse).resize((1400, 1000), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    ("side", "part"), [(None, 1), (200, 1), (166, 2), (112, 2), (83, 4), (42, 4), (41, 8), (1, 8)]
)
def test_a_large_jpeg_is_decoded_no_larger_than_it_needs_to_be(mode, side, part, tmp_path):
    path = str(tmp_path / "photograph.jpg")
    photograph(mode).save(path, quality=95)
    whole, picture = Image.fromarray(decode(path)), decode(path, side)
    assert picture.shape[:2] == (1000 // part, 1400 // part)
    averages = np.asarray(whole.reduce(part)).astype(int)
    assert np.abs(picture - averages).mean() < 1
    assert np.abs(picture - averages).max() < 12


def test_rotation_and_other_formats_of_large_files(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph().save(tmp_path / "turned.jpg", exif=exif)
    assert decode(str(tmp_path / "turned.jpg"), 112).shape == (700, 500, 3)
    photograph().save(tmp_path / "large.png")
    whole = decode(str(tmp_path / "large.png"))
    np.testing.assert_array_equal(decode(str(tmp_path / "large.png"), 1), whole)


def test_whoever_scales_pictures_down_asks_for_small_ones(tmp_path, monkeypatch):
    photograph().save(tmp_path / "large.jpg", quality=95)
    images = load_images(str(tmp_path))
    whole = images.images[0]
    asked = []

    def noted(path, side=None):
        asked.append(side)
        return decode(path, side)

    monkeypatch.setattr(image_files, "decode", noted)
    backbone = load_backbone("pixels", image_size=32)
    _, pixels, *_ = _Batches(images, backbone, 1, [range(1)])[0]
    assert np.abs(pixels[0].numpy() - backbone.prepare(whole).astype(int)).mean() < 1
    plots.image_rows(images.images, [[0]], ["a picture"])
    sure = dict.fromkeys(("confidence", "agreement", "distance"), 1.0)
    table = pd.DataFrame({"path": images.ids, "cluster": 0, "second_choice": -1, **sure})
    write_gallery(tmp_path / "gallery.html", table, images, thumbnail=48)
    assert asked == [32, 64, 48]


def test_frames_and_transparency_in_full(hostile):
    assert (decode(str(hostile / "alpha.png"))[:, :3] == RED).all()
    assert (decode(str(hostile / "alpha.png"))[:, 3:] == 255).all()
    turned = decode(str(hostile / "turned.png"))
    assert (turned[0] == RED).all()
    assert (turned[1:] == (0, 0, 255)).all()


def test_what_is_listed(hostile):
    images = load_images(str(hostile))
    expected = {f"good{n}.png" for n in range(10)} | set(REPORTED) | set(LINKS) | {"pipe.png"}
    expected |= {readable_name(name) for name in CONVERTED} | {"folder.jpg/inside.png"}
    assert set(images.ids) == expected
    assert list(images.images.names) == sorted(images.images.names)
    assert r"latin-\xe9.png" in images.ids


def test_the_report_and_the_tables(hostile, tmp_path):
    images = load_images(str(hostile))
    with pytest.warns(UserWarning, match=r"14 of 51 images left out"):
        features = embed(
            images, "pixels", image_size=4, data_dir=tmp_path, num_workers=0, progress=False
        )
    report = pd.read_csv(next(tmp_path.rglob("unreadable.csv")))
    assert set(report["id"]) == {*REPORTED, *LINKS, "pipe.png"}
    assert len(features) == 37
    write_json(tmp_path / "ids.json", features.ids)
    pd.Series(features.ids).to_csv(tmp_path / "ids.csv", index=False)
    assert pd.read_csv(tmp_path / "ids.csv")["0"].tolist() == list(features.ids)
    assert "new\\u000aline, and 'quotes\".png" in features.ids
    assert r"latin-\\xe9.png" in features.ids


def test_pictures_travel_to_other_processes(hostile):
    import pickle

    files = ImageFiles(str(hostile), ("good3.png",))
    assert (pickle.loads(pickle.dumps(files))[0][0, 0] == (3, 100, 200)).all()


def test_links_are_followed_and_each_folder_is_read_once(tmp_path):
    for folder in ("photos/a", "elsewhere/deep"):
        (tmp_path / folder).mkdir(parents=True)
        red().save(tmp_path / folder / "1.png")
    (tmp_path / "photos" / "Z").symlink_to(tmp_path / "photos" / "a")
    (tmp_path / "photos" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "c").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    assert load_images(str(tmp_path / "photos")).ids == ("a/1.png", "b/deep/1.png")


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"dataset='.*': .*: Permission denied$"):
        load_images(str(tmp_path))


def test_splits_of_a_folder(tmp_path):
    for name in ("train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "more/cat/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        red().save(tmp_path / name)
    assert len(load_images(str(tmp_path))) == 4
    both = load_images(str(tmp_path), split="both", labels="folders")
    assert both.ids == ("test/cat/3.png", "train/cat/1.png", "train/dog/2.png")
    assert both.class_names == ("cat", "dog")
    assert both.labels.tolist() == [0, 0, 1]
    train = load_images(str(tmp_path), split="train", labels="folders")
    assert len({both.name, train.name, load_images(str(tmp_path)).name}) == 3
    with pytest.raises(ValueError, match=r"'train' and 'test' in .* are no classes; give split="):
        load_images(str(tmp_path), labels="folders")
    for split in ("../elsewhere", "..", "", "train/cat", "val"):
        with pytest.raises(ValueError, match=r"split='.*': .* has no sub-folder"):
            load_images(str(tmp_path), split=split)
    with pytest.raises(ValueError, match=r"split='both': .* of the name 'train'"):
        load_images(str(tmp_path / "train"), split="both")


def test_classes_are_sub_folders_only_when_asked(tmp_path):
    for name in ("b/1.png", "a/x/2.png", "a/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        red().save(tmp_path / name)
    images = load_images(str(tmp_path))
    assert images.labels is None
    assert images.ids == ("a/3.png", "a/x/2.png", "b/1.png")
    labelled = load_images(str(tmp_path), labels="folders")
    assert labelled.class_names == ("a", "b")
    assert labelled.labels.tolist() == [0, 0, 1]
    assert labelled.fingerprint == images.fingerprint
    assert load_images(str(tmp_path), split="a").ids == ("3.png", "x/2.png")
    with pytest.raises(ValueError, match=r"split='test': .* has no sub-folder"):
        load_images(str(tmp_path), split="test")
    red().save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"image 'loose\.png' lies in no sub-folder"):
        load_images(str(tmp_path), labels="folders")
    with pytest.raises(ValueError, match="labels='names': 'folders' or None is allowed"):
        load_images(str(tmp_path), labels="names")


def test_fingerprint_notices_added_and_changed_files(tmp_path):
    red().save(tmp_path / "a.png")
    before = load_images(str(tmp_path)).fingerprint
    assert load_images(str(tmp_path)).fingerprint == before
    red(size=(9, 9)).save(tmp_path / "a.png")
    changed = load_images(str(tmp_path)).fingerprint
    red().save(tmp_path / "b.png")
    assert len({before, changed, load_images(str(tmp_path)).fingerprint}) == 3


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match="there is no image in this folder"):
        load_images(str(tmp_path))
    with pytest.raises(ValueError, match=r"one of 'digits', .*, an existing folder of images"):
        load_images(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="dataset='': one of"):
        load_images("")


def test_relative_paths_start_here_then_at_home(tmp_path, monkeypatch):
    (tmp_path / "home" / "photos").mkdir(parents=True)
    red().save(tmp_path / "home" / "photos" / "a.png")
    monkeypatch.setenv("TEMI_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert load_images("photos").ids == ("a.png",)
    (tmp_path / "photos").mkdir()
    red().save(tmp_path / "photos" / "b.png")
    assert load_images("photos").ids == ("b.png",)


@pytest.mark.parametrize("error", [MemoryError(), OSError(24, "Too many open files")])
def test_what_is_not_for_want_of_the_file_is_no_unreadable_image(hostile, error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(error)):
        decode(str(hostile / "good3.png"))


def decoded(image, path, **options):
    image.save(path, **options)
    return decode(str(path))


def test_what_is_transparent_in_a_picture_without_alpha_is_white(tmp_path):
    for mode, clear in (("1", 0), ("L", 0), ("RGB", (0, 0, 0))):
        seen = decoded(Image.new(mode, (6, 4), 0), tmp_path / "a.png", transparency=clear)
        assert seen.shape == ((4, 6, 3) if mode == "RGB" else (4, 6))
        assert (seen == 255).all()
    values = Image.fromarray(np.array([[0, 257, 514]], np.uint16))
    assert decoded(values, tmp_path / "a.png", transparency=257).tolist() == [[0, 255, 2]]


def test_the_range_of_sixteen_bits(tmp_path):
    values = np.array([[0, 255, 65280, 65535]], np.uint16)
    assert decoded(Image.fromarray(values), tmp_path / "a.png").tolist() == [[0, 1, 254, 255]]
    whole = Image.fromarray(values.astype(np.int32))
    assert decoded(whole, tmp_path / "a.tif").tolist() == [[0, 1, 254, 255]]
    for value in (-1, 65536):
        with pytest.raises(UnreadableImageError, match="32-bit"):
            decoded(Image.new("I", (6, 4), value), tmp_path / "a.tif")


def test_other_formats_are_refused_whatever_they_are_called(tmp_path):
    (tmp_path / "a.png").write_bytes(b"P6 1 1 255\n\0\0\0")
    with pytest.raises(UnreadableImageError, match="not an image in a known format"):
        decode(str(tmp_path / "a.png"))


def test_large_photographs_are_no_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    Image.new("L", (6, 4)).save(tmp_path / "a.png")
    with warnings.catch_warnings(record=True) as seen:
        decode(str(tmp_path / "a.png"))
    assert not seen


def test_a_network_folder_that_is_gone(tmp_path, monkeypatch):
    Image.new("L", (6, 4)).save(tmp_path / "a.png")

    def fail(*_, **__):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Stale"):
        decode(str(tmp_path / "a.png"))


def test_what_archives_add_is_no_image(tmp_path):
    for name in ("a.png", "__MACOSX/a.png", ".hidden/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (6, 4)).save(tmp_path / name)
    assert list_images(tmp_path) == ["a.png"]


def test_a_changed_size_changes_the_fingerprint(tmp_path):
    seen = set()
    for text in (b"1", b"22"):
        (tmp_path / "a.png").write_bytes(text)
        os.utime(tmp_path / "a.png", (1, 1))
        seen.add(load_images(str(tmp_path)).fingerprint)
    assert len(seen) == 2


@pytest.mark.parametrize("sign", ["\x85", "\x9f", "\u2028", "\u2029"])
def test_line_breaks_in_names(sign):
    assert readable_name(f"a{sign}b") == f"a\\u{ord(sign):04x}b"
