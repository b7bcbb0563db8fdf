"""Shards hold the same images under the same classes, somewhat smaller, whatever was stopped on the way."""

import os
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from mae_core import write_shards
from mae_core.decode import read_image
from mae_core.listing import images_or_shards
from tests.fixtures import ROOT
from tests.fixtures.image import broken_files, encoded, photograph
from transfer.data.imagenet import read_split, wnids

CLASSES = wnids()[3], wnids()[700]
# The command, which stands still within its fourth shard of five images.
HELD = """
import sys, time
from mae_core import write_shards

def held(*arguments):
    begun.append(arguments)
    if len(begun) == 3 * 5 + 3:
        print("held", flush=True)
        time.sleep(600)
    return header(*arguments)

begun, header, write_shards.header = [], write_shards.header, held
sys.exit(write_shards.main(sys.argv[1:]))
"""


@pytest.fixture
def data(tmp_path):
    """Two class folders of eight images: large, small, grey and PNG."""
    for number in range(16):
        image = photograph(150 + number, 100, number) if number % 4 else photograph(50, 60, number)
        image = image.convert("L") if number % 4 == 2 else image
        kind = "PNG" if number % 4 == 3 else "JPEG"
        file = tmp_path / "data" / CLASSES[number // 8] / f"{number:02}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(image, kind))
    return tmp_path / "data"


def write(data, out, *flags):
    return write_shards.main(["--data", str(data), "--out", str(out), "--short", "64", "--each", "5", *flags])


def contents(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_shards_hold_the_same_labels_and_nearly_the_same_pixels(tmp_path, data, workers):
    assert write(data, tmp_path / "out", "--workers", workers) == 0
    assert list(contents(tmp_path / "out")) == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
    entries, files = images_or_shards(tmp_path / "out"), sorted(data.glob("*/*"))
    assert len(entries) == len(files) == 16
    for entry, file in zip(entries, files):
        assert f"!/{file.parent.name}/{file.name}" in entry
        image = read_image(file)
        found = read_image(entry)
        if image.height == 60:  # small enough: the file as it was
            assert np.array_equal(found, image)
        else:
            assert min(found.size) == found.height == 64
            assert found.width == round(image.width * 0.64)
            expected = image.resize(found.size, Image.Resampling.BICUBIC)
            error = np.abs(np.asarray(found).astype(float) - np.asarray(expected))
            assert error.mean() < 4
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "unpacked", filter="data")
    split, original = read_split(tmp_path / "unpacked")[0], read_split(data)[0]
    assert split.labels == original.labels == (3,) * 8 + (700,) * 8


def test_shards_of_shards_are_those_of_the_files(tmp_path, data):
    assert write(data, tmp_path / "once") == 0
    with tarfile.open(tmp_path / "packed.tar", "w") as tar:
        for file in sorted(data.glob("*/*")):
            tar.add(file, file.relative_to(data))
    (tmp_path / "tars").mkdir()
    (tmp_path / "packed.tar").rename(tmp_path / "tars" / "packed.tar")
    assert write(tmp_path / "tars", tmp_path / "twice") == 0
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, data, capsys, number):
    for copy in range(40):
        for file in sorted(data.glob(f"{CLASSES[0]}/0*"))[:8]:
            (data / CLASSES[0] / f"copy{copy}-{file.name}").write_bytes(file.read_bytes())
    assert write(data, tmp_path / "whole") == 0
    flags = ["--data", str(data), "--out", str(tmp_path / "out"), "--short", "64", "--each", "5", "--workers", "2"]
    program = subprocess.Popen([sys.executable, "-c", HELD, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while (line := program.stdout.readline()) != "held\n":
        assert line
    program.send_signal(number)
    program.communicate()
    assert program.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 130}[number]
    done = contents(tmp_path / "out")
    assert len(done) == 3
    capsys.readouterr()
    with pytest.raises(
        write_shards.UserError, match=r"out lacks \d+ of 68 shards: mae_core.write_shards goes on there"
    ):
        images_or_shards(tmp_path / "out")
    inodes = {name: (tmp_path / "out" / name).stat().st_ino for name in done}
    assert write(data, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in done} == inodes
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.endswith(".part")]


def test_what_cannot_be_read_is_copied_and_named_and_too_much_of_it_is_an_error(tmp_path, data, capsys):
    for name, content in broken_files().items():
        (data / CLASSES[0] / name).write_bytes(content)
    assert write(data, tmp_path / "out") == 0
    said = capsys.readouterr().out
    for name, content in broken_files().items():
        assert f"unreadable image, copied as it is: {data / CLASSES[0] / name}" in said
        stored = "" if name.endswith(".jpg") else ".jpg"
        (entry,) = [entry for entry in images_or_shards(tmp_path / "out") if f"/{name}{stored}@" in entry]
        assert write_shards.bytes_of(os.fsencode(entry)) == content
    for number in range(11):
        (data / CLASSES[1] / f"none{number}.jpg").write_bytes(b"none")
    assert write(data, tmp_path / "other") == 2
    assert "more than 10 images cannot be read" in capsys.readouterr().err


def refuses(capsys, said, *call):
    capsys.readouterr()
    assert write(*call) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_wrong_calls_are_refused_in_one_sentence(tmp_path, data, capsys):
    out = tmp_path / "out"
    for flag in ("--short", "--each"):
        refuses(capsys, "--short and --each must be 1 or more", data, out, flag, "0")
    refuses(capsys, "its shards would be read as data", data, data / "out")
    refuses(capsys, "absent is not a folder of images", tmp_path / "absent", out)
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    refuses(capsys, "full is not empty", data, tmp_path / "full")
    assert write(data, out) == 0
    refuses(capsys, "out was begun with another short: give an empty folder", data, out, "--short", "32")
    (data / CLASSES[0] / "00.JPEG").unlink()
    refuses(capsys, "out was begun with another images and another names", data, out)
    (data / CLASSES[0] / "03.PNG.jpg").touch()
    refuses(capsys, "03.PNG.jpg twice: rename one", data, tmp_path / "other")
    (out / "shards.json").write_text("[")
    (data / CLASSES[0] / "03.PNG.jpg").unlink()
    refuses(capsys, "shards.json cannot be read", data, out)


def test_another_file_of_that_name_means_nothing(tmp_path, data):
    assert write(data, tmp_path / "out") == 0
    for text in ("[]", "{}", '{"shards": 3}', "no json"):
        (tmp_path / "out" / "shards.json").write_text(text)
        assert len(images_or_shards(tmp_path / "out")) == 16
