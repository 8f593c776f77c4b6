import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import temi
from temi import files
from temi.files import (
    home,
    path_part,
    read_json,
    readable_path,
    sha256,
    whole_file,
    writable_path,
    write_json,
    write_whole,
)


def test_plain_names_stay():
    for name in ("digits", "cifar10", "dinov2_vits14", "beta0.7", "a+b"):
        assert path_part(name) == name


@pytest.mark.parametrize(
    "name",
    ["timm:x", "../x", "my photos", "con", "nul.txt", "A", "a", "x.", "", "é", "a" * 300, "a/b"],
)
def test_any_name_becomes_a_valid_part(name):
    part = path_part(name)
    assert part == part.lower()
    assert 0 < len(part) <= 64
    assert set(part) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.+-")
    assert part.split(".")[0] not in ("con", "nul", "")
    assert not part.endswith(".")


def test_names_that_look_alike_stay_apart():
    names = ["a b", "a-b", "a/b", "A-B", "a:b", "a.b."]
    assert len({path_part(name) for name in names}) == len(names)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"a": math.nan})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_several_may_write_a_shared_file(tmp_path):
    def write(number):
        write_json(tmp_path / "x.json", [number] * 1000, shared=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert len(set(read_json(tmp_path / "x.json"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_sha256(tmp_path):
    write_whole(tmp_path / "abc", "abc")
    assert sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")  # FIPS 180-2, appendix B.1


def test_home_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TEMI_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("TEMI_HOME")
    assert (home() / "pyproject.toml").exists()
    (tmp_path / "pyproject.toml").touch()  # as some package leaves beside the installed ones
    monkeypatch.setattr(files, "CHECKOUT", tmp_path)
    assert home() == Path.cwd()


def test_an_error_without_a_number_keeps_its_words(tmp_path):
    words = "cannot write this; what stood there before is as it was"
    with pytest.raises(OSError, match=words), whole_file(tmp_path / "file"):
        raise OSError("cannot write this")


def test_texts_are_utf8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    write_whole(tmp_path / "text", "\u65e5\u672c\n")
    assert (tmp_path / "text").read_bytes() == b"\xe6\x97\xa5\xe6\x9c\xac\n"


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    assert writable_path("~/runs") == tmp_path / "runs"
    monkeypatch.setenv("TEMI_HOME", "~/temi")
    assert writable_path("runs") == tmp_path / "temi" / "runs"
    assert writable_path(tmp_path / "x") == tmp_path / "x"
    (tmp_path / "elsewhere" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "below")
    assert writable_path(tmp_path / "link") == tmp_path / "link"
    assert writable_path(tmp_path / "link" / ".." / "x") == tmp_path / "elsewhere" / "x"


def test_a_tilde_of_nobody_is_a_name_like_any_other(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~old photos").mkdir()
    assert readable_path("~old photos") == tmp_path / "~old photos"
    with pytest.raises(ValueError, match=r"dataset='~nobody/x': one of .* is allowed"):
        temi.load_images("~nobody/x")
