"""Files that are whole or not there, and never written through a link; and what a full disk is answered by."""

import errno
import json
import os
import resource
import signal
import stat

import pytest
import torch

from mae_core.checkpoint import save_pickle, save_weights
from mae_core.errors import UserError
from mae_core.writing import open_to_append, write_json, write_text, write_texts

NUMBERS = {"numbers": torch.zeros(50_000)}
WRITERS = {
    "text": lambda path: write_text(path, "a" * 200_000),
    "json": lambda path: write_json(path, ["a" * 1000] * 200),
    "safetensors": lambda path: save_weights(path, NUMBERS, {}),
    "pickle": lambda path: save_pickle(path, NUMBERS),
}


@pytest.fixture
def little_room():
    """No file may grow beyond 100,000 bytes: the system refuses as on a full disk, halfway through a write."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_does_not_fit_is_one_sentence_and_the_old_one_stays(tmp_path, kind, little_room):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError) as caught:
        WRITERS[kind](path)
    assert str(caught.value) == (
        f"{path} cannot be written: it is larger than a file may become: raise this user's limit (ulimit -f)"
    )
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "old"}


@pytest.mark.parametrize("kind", WRITERS)
def test_no_link_is_followed_and_the_umask_decides_who_may_read(tmp_path, kind):
    """Neither where the file is to be, nor where it is written first."""
    victim = tmp_path / "elsewhere" / "victim"
    victim.parent.mkdir()
    victim.write_text("precious")
    for name in ("file", "file.tmp", f".file.{os.getpid()}.part"):
        (tmp_path / name).symlink_to(victim)
    before = os.umask(0o027)
    try:
        WRITERS[kind](tmp_path / "file")
    finally:
        os.umask(before)
    assert [p.name for p in victim.parent.iterdir()] == ["victim"]
    assert victim.read_text() == "precious"
    found = (tmp_path / "file").lstat()
    assert stat.S_ISREG(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o640


def test_a_log_is_not_continued_through_a_link(tmp_path):
    (tmp_path / "log").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="log cannot be written: it is a symbolic link, which is not followed here"):
        open_to_append(tmp_path / "log")
    assert not (tmp_path / "victim").exists()
    for line in ("1\n", "2\n"):
        with open_to_append(tmp_path / "own") as log:
            log.write(line)
    assert (tmp_path / "own").read_text() == "1\n2\n"


def test_several_texts_are_all_written_or_none(tmp_path, little_room):
    files = [tmp_path / "a.md", tmp_path / "tables" / "b.md", tmp_path / "c.md"]
    write_texts(dict.fromkeys(files, "old"))
    with pytest.raises(UserError, match=r"b\.md cannot be written"):
        write_texts({files[0]: "new", files[1]: "a" * 200_000, files[2]: "new"})
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == dict.fromkeys(files, "old")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "chmod"),
        (errno.ESTALE, os.strerror(errno.ESTALE)),
    ],
)
def test_why_a_file_cannot_be_written_is_said_in_words(tmp_path, monkeypatch, number, said):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=said) as caught:
        write_text(tmp_path / "file", "new")
    assert "Errno" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_write_json(tmp_path):
    path = tmp_path / "new" / "record.json"
    write_json(path, {"b": [1, 2.5, None], "a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n "a": "é",\n "b": [\n  1,\n  2.5,\n  null\n ]\n}\n'
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_failed_write_json_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"whole": True})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"first": "written", "second": object()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
