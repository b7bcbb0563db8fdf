"""Pictures in the page: which are shown, how large they may be, and what is said of the others."""

import base64
import hashlib
import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.page import pictures
from benchmarks.page.pictures import ONE, SIDES, pictures_of
from benchmarks.report import report
from tests.fixtures.page import read_page
from tests.fixtures.records import made, ok
from transfer.run import write_record


def draw(path: Path, side: int, noise: int, seed: int = 0) -> str:
    """Write random pixels of so many levels; the file's SHA-256."""
    pixels = np.random.default_rng(seed).integers(0, noise, (side, side, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_picture_is_shown_while_it_is_the_one_of_its_record(tmp_path):
    sha256 = draw(tmp_path / "runs" / "x" / "predictions.png", 64, 255)
    draw(tmp_path / "reconstruction.png", 32, 255)
    write_record(replace(ok("ade20k", miou=1.0), artifacts={"predictions.png": sha256}), tmp_path / "runs" / "x")
    report(tmp_path)
    page = read_page(tmp_path)
    assert [image["alt"] for image in page.all("img")] == ["ade20k, enc, seed 0", "reconstruction.png"]
    filtered = [figure for figure in page.all("figure") if "data-recipe" in figure]
    assert filtered == [{"data-recipe": "mini", "data-data": "miniature data"}]
    for image in page.all("img"):
        kind, _, encoded = image["src"].partition(",")
        assert kind == "data:image/webp;base64"
        opened = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert (opened.width, opened.height) == (int(image["width"]), int(image["height"]))
    draw(tmp_path / "runs" / "x" / "predictions.png", 64, 255, seed=1)
    report(tmp_path)
    page = read_page(tmp_path)
    assert [image["alt"] for image in page.all("img")] == ["reconstruction.png"]
    assert "runs/x/predictions.png: changed after its record" in page.text


def test_pictures_are_bounded_one_by_one_and_together(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "ALL", 250_000)
    draw(tmp_path / "noise.png", 800, 255)
    for i in range(6):
        draw(tmp_path / f"{i}.png", 320, 100, i)
    shown, left = pictures_of(tmp_path, [], {})
    sizes = [len(base64.b64decode(picture.uri.partition(",")[2])) for picture in shown]
    assert max(sizes) <= ONE
    assert 150_000 < sum(sizes) <= 250_000
    assert len(shown) + len(left) == 7
    assert left
    assert {picture.width for picture in shown} <= {320, *SIDES}
    assert all("left out" in line or "more than" in line for line in left)


@pytest.mark.parametrize("kind", ["text", "pipe", "cut", "bomb", "jpeg", "empty"])
def test_what_is_no_picture_is_named(tmp_path, kind):
    path = tmp_path / "odd.png"
    draw(path, 64, 255)
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "jpeg":
        Image.new("RGB", (8, 8)).save(path, "JPEG")
    elif kind == "bomb":
        Image.new("1", (8_000, 8_000)).save(path)
    else:
        path.write_bytes({"text": b"hello", "cut": content[:4000], "empty": b""}[kind])
    shown, left = pictures_of(tmp_path, [], {})
    assert shown == []
    assert len(left) == 1
    reasons = {"pipe": "it is no regular file", "bomb": "8000 x 8000 px are too many"}
    assert left == [f"odd.png: {reasons.get(kind, 'it cannot be decoded as a PNG')}"]


def test_an_artifact_leads_out_of_no_folder(tmp_path):
    sha256 = draw(tmp_path / "secret.png", 16, 255)
    out = tmp_path / "out"
    made(out, replace(ok("ade20k", miou=1.0), artifacts={"../../../../secret.png": sha256}))
    assert read_page(out).all("img") == []
