import json
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mae_core.decode import UNREADABLE, read_image, read_pixels
from mae_core.errors import UserError
from mae_core.files import escape_output, images_among, is_image, leaves, leaving, open_regular, printable, walk
from mae_core.listing import images_or_shards, list_images
from mae_core.writing import write_json


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_what_browsers_of_files_leave_behind_is_no_data(tmp_path):
    touch(*(tmp_path / name for name in ("a/1.jpg", "a/._1.jpg", ".ipynb_checkpoints/1.jpg", "a/@eaDir/1.jpg")))
    touch(tmp_path / "a" / ".DS_Store", tmp_path / "a" / "Thumbs.db", tmp_path / "._0.tar")
    assert list(walk(tmp_path)) == list_images(tmp_path) == [tmp_path / "a" / "1.jpg"]
    assert images_or_shards(tmp_path) == [str(tmp_path / "a" / "1.jpg")]


def test_each_real_folder_is_visited_once(tmp_path):
    images = tmp_path / "images"
    touch(images / "1.jpg", images / "b" / "2.jpg", tmp_path / "elsewhere" / "3.jpg")
    (images / "b" / "up").symlink_to(images)
    (images / "all").symlink_to(tmp_path)
    (images / "also").symlink_to(tmp_path / "elsewhere")
    found = list(walk(images))
    assert sorted(path.name for path in found) == ["1.jpg", "2.jpg", "3.jpg"]


@pytest.mark.parametrize("read", [open_regular, read_image, read_pixels])
def test_only_regular_files_are_opened(tmp_path, read):
    """A pipe without a writer would be waited for, and /dev/zero read, for ever."""
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero"):
        with pytest.raises(UNREADABLE, match="no regular file"):
            read(path)
    (tmp_path / "file").write_bytes(b"content")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"content"


def test_names_that_are_no_utf_8_can_be_printed():
    assert printable(os.fsdecode(b"caf\xe9/\xff.jpg")) == r"caf\xe9/\xff.jpg"
    assert printable("café €") == "café €"


def test_a_record_with_such_a_name_is_written_and_read_back(tmp_path):
    value = {"root": os.fsdecode(b"caf\xe9"), "plain": "café"}
    write_json(tmp_path / "record.json", value)
    assert json.loads((tmp_path / "record.json").read_text(encoding="utf-8")) == value


def test_such_names_are_printed_and_raised(tmp_path, monkeypatch):
    with open(tmp_path / "out", "w", encoding="utf-8") as out:
        monkeypatch.setattr("sys.stdout", out)
        escape_output()
        print(os.fsdecode(b"caf\xe9"), "é")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "caf\\udce9 é\n"
    assert str(UserError(os.fsdecode(b"caf\xe9"))) == r"caf\xe9"


ENDS = ["", ".jpg", ".JPEG", ".tar.png", ".Jpg", ".txt"]
NAMES = st.builds(
    str.__add__,
    st.sampled_from(["a", "b c", ".hidden", "@ea", "Thumbs.db", "jpg", ".", "a\n", "\n.b"]),
    st.sampled_from(ENDS),
)


@given(st.lists(NAMES) | st.sampled_from(ENDS).flatmap(lambda end: st.lists(NAMES.map(lambda name: name + end))))
@example(["a.jpg\nb.jpg", "c.txt"])
@example(["a.jpg", ".b.jpg"])
def test_the_images_among_names_are_those_one_by_one(names):
    assert images_among(names) == [name for name in names if is_image(name)]


@given(st.lists(st.sampled_from(["a", "a/b", "..", "../a", "a/..", "a..b", "/a", "", "a\n/b", "..\n"])))
def test_the_names_that_leave_are_those_one_by_one(names):
    assert leaving(names) == [name for name in names if leaves(name)]
