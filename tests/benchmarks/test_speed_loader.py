"""What `speed.py loader` measures: that each arm reads what it says, and what is made of the times."""

import json
import tarfile

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from benchmarks import speed, speed_loader
from benchmarks.speed_loader import Arm, decoders, loader_table, loader_values, on_one_core
from benchmarks.timing import Timing, alternate
from mae_core import native
from tests.fixtures.image import encoded, photograph


@pytest.fixture
def folder(tmp_path):
    """Class folders of 10 JPEGs and 2 PNGs."""
    for number in range(12):
        kind = "PNG" if number % 6 == 5 else "JPEG"
        file = tmp_path / "images" / f"class{number % 3}" / f"{number}.{kind.lower()}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(photograph(50 + number, 40, number), kind))
    return tmp_path / "images"


def run(tmp_path, data, *flags):
    command = ["loader", "--data", str(data), "--arch", "vit_mini_patch8", "--batch", "4", "--device", "cpu"]
    timed = ["--warmup", "0", "--repeats", "2", "--out", str(tmp_path / "out"), *flags]
    assert speed.main([*command, *timed]) == 0
    return json.loads((tmp_path / "out" / f"loader-{data.name}.json").read_text())


def test_it_reports_the_limit_one_core_and_workers(tmp_path, folder, capsys):
    found = run(tmp_path, folder, "--workers", "2")
    rates = {(arm["name"], arm["workers"]): arm["images_per_second"] for arm in found["arms"]}
    assert {("ours", 0), ("ours", 1), ("ours", 2), ("only decode: Pillow", 0)} <= rates.keys()
    assert (speed_loader.IMAGE_FOLDER, 0) in rates
    assert {("evaluation images", 2), ("evaluation images, vit_mini_patch8", 2)} <= rates.keys()
    limit = max(rate for (name, _), rate in rates.items() if name.startswith("only decode"))
    assert found["of_decoding_alone"] == pytest.approx(rates["ours", 0] / limit)
    assert found["cores_for_20000_images_per_second"] == pytest.approx(20000 / rates["ours", 0])
    assert {arm["clock"] for arm in found["arms"] if arm["workers"]} == {"wall"}
    assert f"| ours | 2 | {rates['ours', 2]:.0f} |" in capsys.readouterr().out


def test_images_in_tar_files_have_no_arm_of_image_folder(tmp_path, folder):
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        tar.add(folder, "images")
    names = {arm["name"] for arm in run(tmp_path, tmp_path / "shards", "--workers", "0")["arms"]}
    assert speed_loader.IMAGE_FOLDER not in names
    assert {"ours", "only decode: Pillow"} <= names


def test_all_decoders_give_the_same_pixels(folder):
    contents = [file.read_bytes() for file in sorted(folder.glob("*/*.jpeg"))]
    works = decoders(contents)
    expected = [pil_to_tensor(Image.open(file)).flatten(1).T for file in sorted(folder.glob("*/*.jpeg"))]
    assert len(works) >= 2
    for name, each in works.items():
        for work, pixels in zip(each, expected):
            result = work()
            if name == "only decode: libjpeg-turbo":
                assert result == 1
                room, offset = work.args[0], work.args[-1] - work.args[0].data_ptr()
                found = room[offset : offset + pixels.numel()].view(-1, 3)
            elif isinstance(result, torch.Tensor):
                found = result.flatten(1).T
            else:
                found = pil_to_tensor(result).flatten(1).T
            assert torch.equal(found, pixels)


def test_the_arm_without_the_library_leaves_it_as_it_was(folder, monkeypatch):
    called = []
    monkeypatch.setattr(native, "library", lambda: called.append(1))
    speed_loader.uncompiled(iter([1]))
    assert not called
    assert native.library() is None
    assert called


def test_both_loaders_give_normalised_batches_of_the_same_files(tmp_path):
    """Of images of one colour each, which no crop or flip changes: the same 8 batches of 4 in another order."""
    for number in range(32):
        file = tmp_path / f"class{number % 3}" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), (8 * number, 0, 255 - number)).save(file)
    files, folder = speed_loader.files_of(tmp_path, 16)
    workloads, colours = on_one_core(files, folder, 16, 4), []
    for name in (speed_loader.NORMALISED, speed_loader.IMAGE_FOLDER):
        batches = [workloads[name]() for _ in range(8)]
        assert all((batch.shape, batch.dtype) == ((4, 3, 16, 16), torch.float32) for batch in batches)
        seen = torch.cat(batches)[:, :, 3, 5]
        colours.append(seen[seen[:, 0].argsort()])
    torch.testing.assert_close(*colours)
    assert workloads["ours"]().dtype == torch.uint8


def test_the_table_gives_shares_of_the_faster_decoder():
    arms = [
        Arm("ours", 0, 100, Timing((0.5, 0.5))),
        Arm("only decode: a", 0, 100, Timing((0.4,))),
        Arm("only decode: b", 0, 100, Timing((0.8,))),
        Arm("ours", 16, 1000, Timing((0.5,))),
    ]
    lines = loader_table(arms).splitlines()
    assert lines[2:6] == [
        "| ours |  | 200 | ± 0.0 % | 0.80 |",
        "| only decode: a |  | 250 |  | 1.00 |",
        "| only decode: b |  | 125 |  | 0.50 |",
        "| ours | 16 | 2000 |  |  |",
    ]
    assert "20000 images/s take 100.0 such cores" in lines[-1]
    assert loader_values(arms)["of_decoding_alone"] == pytest.approx(0.8)


def test_workloads_can_be_timed_by_another_clock():
    ticks = iter(range(100))
    timings = alternate({"a": lambda: next(ticks), "b": lambda: None}, 1, 2, "cpu", lambda: next(ticks))
    assert timings["a"].seconds == (2, 2)
    assert timings["b"].seconds == (1, 1)
