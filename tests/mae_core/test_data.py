import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms as v1

from mae_core import data, distributed
from mae_core.batch import InTurn, Numbered
from mae_core.data import Images, Sample, TrainingStream, loader, normalize, pretraining_transform
from mae_core.decode import read_pixels
from mae_core.errors import UserError
from mae_core.listing import images_or_shards, list_images


def flat(stream):
    return [sample for chunk in stream for sample in chunk]


def test_an_epoch_takes_every_image_once_but_for_the_incomplete_batch():
    for epoch in range(4):
        samples = flat(TrainingStream(22, 5, 5, 0, 4 * epoch, 4 * (epoch + 1)))
        assert len({s.index for s in samples}) == len(samples) == 20
        assert {s.index for s in samples} <= set(range(22))
    missed = [set(range(22)) - {s.index for s in flat(TrainingStream(22, 5, 5, 0, 4 * e, 4 * e + 4))} for e in range(9)]
    assert len(set.union(*missed)) > 2  # not the same ones for ever


def test_order_depends_only_on_seed_and_epoch():
    whole = flat(TrainingStream(22, 6, 6, 3, 0, 9))
    assert flat(TrainingStream(22, 6, 2, 3, 0, 9)) == whole  # micro-batches of another size
    assert flat(TrainingStream(22, 6, 6, 3, 4, 9)) == whole[24:]  # a restart in the middle of the second epoch
    assert [s.position for s in whole] == list(range(54))  # no two samples share an augmentation
    assert [s.index for s in whole[:18]] != [s.index for s in whole[18:36]]
    assert flat(TrainingStream(22, 6, 6, 4, 0, 9)) != whole
    assert len(TrainingStream(22, 6, 2, 3, 4, 9)) == len(list(TrainingStream(22, 6, 2, 3, 4, 9))) == 15


@pytest.mark.parametrize(("batch", "repeats"), [(8, 1), (12, 3)])
def test_two_processes_share_each_batch(monkeypatch, batch, repeats):
    whole, shares = list(TrainingStream(22, batch, batch, 0, 0, 5, repeats)), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append(list(TrainingStream(22, batch, batch // 2, 0, 0, 5, repeats)))
    assert [first + second for first, second in zip(*shares)] == whole


@pytest.fixture
def coordinate_image(tmp_path):
    """256 x 256 px; red tells the column and green the row."""
    y, x = np.mgrid[:256, :256].astype(np.uint8)
    Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1)).save(tmp_path / "coordinates.png")
    return tmp_path / "coordinates.png"


def test_augmentation_does_not_depend_on_workers_or_neighbours(noise_images):
    files = list_images(noise_images)
    dataset = Images(files, pretraining_transform(48, 0.2), seed=5)
    stream = TrainingStream(len(files), 16, 8, 5, 0, 3)
    by_workers = [list(loader(dataset, stream, workers, "cpu")) for workers in (0, 2)]
    assert len(by_workers[0]) == len(by_workers[1]) == 6
    for (images, _, bad), (again, _, bad_again) in zip(*by_workers):
        assert torch.equal(images, again)
        assert bad == bad_again == []
    torch.rand(7), random.random(), np.random.rand()  # whatever was drawn before
    image = dataset[flat(stream)[11]][0]
    assert torch.equal(image, by_workers[0][1][0][3])


def test_augmentation_follows_seed_and_position(coordinate_image):
    transform = pretraining_transform(32, 0.2)
    dataset = Images([coordinate_image] * 2, transform, labels=[4, 7], seed=1)
    (image, label, _), (same, other_label, _) = dataset[Sample(0, 10)], dataset[Sample(1, 10)]
    assert torch.equal(image, same)  # the position decides, not the file
    assert (label, other_label) == (4, 7)
    assert not torch.equal(image, dataset[Sample(0, 11)][0])
    assert not torch.equal(image, Images([coordinate_image], transform, seed=2)[Sample(0, 10)][0])
    assert torch.equal(dataset[1][0], dataset[Sample(1, 1)][0])  # a plain index is its own position


def crops(path, augmentation, count=150, size=224):
    dataset = Images([path], pretraining_transform(size, 0.2, augmentation), seed=0)
    images = [dataset[Sample(0, position)][0] for position in range(count)]
    assert {(image.shape, image.dtype) for image in images} == {((3, size, size), torch.uint8)}
    return [image.int() for image in images]


def test_pretraining_crops_a_fifth_to_all_of_the_area_and_flips_half(coordinate_image):
    shares, ratios, flips = [], [], 0
    for image in crops(coordinate_image, "crop, random size", 400, 64):
        columns, rows = image[0, 32].float(), image[1, :, 32].float()
        # 64 samples at the centres of 64 equal parts: between the first and last lie 63/64 of the crop.
        width, height = ((v[-1] - v[0]).item() * 64 / 63 for v in (columns, rows))
        flips += width < 0
        shares.append(abs(width) * height / 256**2)
        ratios.append(abs(width) / height)
    assert 0.18 < min(shares) < 0.25
    assert 0.95 < max(shares) < 1.02
    assert 0.72 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.39
    assert 150 < flips < 250  # five deviations of a fair coin


def test_images_are_normalised_with_imagenet_s_mean_and_deviation(tmp_path):
    Image.new("RGB", (40, 40), (255, 0, 128)).save(tmp_path / "flat.png")
    image = normalize(Images([tmp_path / "flat.png"], pretraining_transform(8, 0.2))[0][0][None])[0]
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(image, torch.tensor(expected)[:, None, None].expand(3, 8, 8))


def test_unreadable_files_give_black_and_their_name(tmp_path, coordinate_image):
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    files = [tmp_path / name for name in ("empty.jpg", "float.tif", "absent.png", "coordinates.png")]
    dataset = Images(files, pretraining_transform(16, 0.2))
    images, _, bad = next(iter(loader(dataset, [range(4)], 0, "cpu")))
    assert bad == [str(f) for f in files[:3]]
    assert not images[:3].any()
    assert images[3].float().std() > 0.1


def test_a_folder_that_is_gone_ends_the_run_before_a_black_image_is_learnt(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/unmounted is gone: put it back, or mount its disk"):
        Images([tmp_path / "unmounted" / "a.png"], pretraining_transform(16))[0]


def test_unreadable_files_are_named_once_and_too_many_are_an_error(capsys, monkeypatch):
    unreadable, names = data.UnreadableFiles(), [f"file{number:02}" for number in range(data.MAX_UNREADABLE)]
    for name in names:
        unreadable.add([name, name])
        unreadable.add(["file00"])
    said = capsys.readouterr().out.splitlines()
    assert said == [f"unreadable image, replaced by black: {name}" for name in names]
    with pytest.raises(UserError, match=r"11 images cannot be read .at most 10 .*file00, file01,.*mend or delete"):
        unreadable.add(["one more"])
    with pytest.raises(UserError, match="11 images"):  # those of before a restart count
        data.UnreadableFiles(names).add(["one more"])
    monkeypatch.setattr(distributed, "gather_to_all", lambda value: [value, {"theirs", "file03"}])
    ours = data.UnreadableFiles(["mine"])
    assert ours.of_all_processes() == ("file03", "mine", "theirs")
    with pytest.raises(UserError, match="11 images"):  # of all processes together
        data.UnreadableFiles(names).of_all_processes()


def test_list_images(tmp_path):
    names = ["b/z.JPEG", "b/deep/er/y.png", "a.jpg", "c d/x.Tiff"]
    for name in [*names, "b/notes.txt", "b/list.json"]:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "set" / "folder.png").mkdir()
    assert list_images(tmp_path / "set") == sorted(tmp_path / "set" / name for name in names)
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "class").symlink_to(tmp_path / "set" / "b")
    assert [f.name for f in list_images(tmp_path / "subset")] == ["y.png", "z.JPEG"]


def test_a_listing_has_the_order_of_paths_wherever_it_is_called(tmp_path, monkeypatch):
    """Folder by folder: as plain texts "a b" would come before "a/b", and "a-1.png" before "a/1.png"."""
    for name in ("a/1.png", "a/b/2.png", "a b/1.png", "a-1.png", "a.png", "B/1.png", "ä/1.png", "a/b.png", "a\t/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = images_or_shards(tmp_path)
    assert found == [str(path) for path in sorted(tmp_path.rglob("*.png"))]
    monkeypatch.chdir(tmp_path)
    assert images_or_shards(Path(".")) == [str(path) for path in sorted(Path(".").rglob("*.png"))]
    assert images_or_shards(Path("a")) == ["a/1.png", "a/b/2.png", "a/b.png"]


def test_list_images_refuses_what_holds_none(tmp_path):
    with pytest.raises(UserError, match=r"holds no image .*\.jpeg"):
        list_images(tmp_path)
    with pytest.raises(UserError, match="absent is not a folder of images"):
        list_images(tmp_path / "absent")


def test_seeds():
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item(), torch.randperm(9).tolist()

    data.seed_all(1, 2)
    first = draws()
    assert draws() != first
    data.seed_all(1, 2)
    assert draws() == first
    assert len({data.seed_for(a, b) for a in range(50) for b in range(50)}) == 2500


def test_no_augmentation_is_the_centre_crop(coordinate_image):
    images = crops(coordinate_image, "none", 3)
    assert torch.equal(images[0], images[2])
    # The image is 256 px: nothing is resized, and 16 px are cut off on every side.
    assert images[0][0, 0].tolist() == list(range(16, 240))
    assert images[0][1, :, 0].tolist() == list(range(16, 240))


def test_crops_of_fixed_size_move_and_flip_and_never_zoom(coordinate_image):
    images = crops(coordinate_image, "crop, fixed size")
    corners = {(image[0, 0].min().item(), image[1, 0, 0].item()) for image in images}
    assert {left for left, _ in corners} | {top for _, top in corners} == set(range(33))
    for image in images:
        assert image[1, -1, 0] - image[1, 0, 0] == 223
        assert (image[0, 0, -1] - image[0, 0, 0]).abs() == 223
    assert 45 < sum(image[0, 0, 0] > image[0, 0, -1] for image in images) < 105  # five deviations of a fair coin


def test_colour_jitter_is_crop_and_colour(tmp_path):
    Image.new("RGB", (64, 64), (120, 90, 60)).save(tmp_path / "plain.png")
    plain = crops(tmp_path / "plain.png", "crop, random size", 5, 16)
    jittered = torch.stack([image[:, 0, 0] for image in crops(tmp_path / "plain.png", "crop + colour jitter", 200, 16)])
    assert all(image[:, 0, 0].tolist() == [120, 90, 60] for image in plain)
    # Brightness moves the red channel of an even image by up to 40 % even without the other jitters.
    assert jittered[:, 0].min() < 0.7 * 120
    assert jittered[:, 0].max() > 1.3 * 120
    assert len(jittered.unique(dim=0)) > 100


def test_repeated_augmentation_decodes_once_and_crops_several_times(noise_images, monkeypatch):
    opened = []
    monkeypatch.setattr(data, "read_pixels", lambda path: opened.append(path) or read_pixels(path))
    files = list_images(noise_images)
    dataset = Images(files, pretraining_transform(48), seed=0)
    batches = list(loader(dataset, TrainingStream(64, 16, 8, 0, 0, 8, repeats=4), 0, "cpu"))
    assert len(batches) == 16
    # 8 steps of 16 samples, 4 of each image: 32 images decoded, each once, in half a permutation.
    assert len(opened) == len(set(opened)) == 32
    images = batches[0][0]
    assert len({image.sum().item() for image in images}) == 8  # no crop twice


def test_repeated_augmentation_keeps_an_epoch_s_length_and_sees_everything_in_as_many_epochs_as_repeats():
    stream = TrainingStream(22, 6, 6, 0, 0, 12, repeats=3)  # 3 steps an epoch, 9 a permutation
    samples = [flat(TrainingStream(22, 6, 6, 0, step, step + 1, repeats=3)) for step in range(12)]
    assert flat(stream) == [sample for step in samples for sample in step]
    assert len({s.position for step in samples for s in step}) == 72
    for step in samples:
        assert [s.index for s in step] == [step[0].index] * 3 + [step[3].index] * 3
    first = [s.index for step in samples[:9] for s in step]
    assert sorted(first) == sorted(3 * sorted(set(first)))
    assert len(set(first)) == 18


def test_images_are_normalised_as_torchvision_s_first_transforms_did(noise_images):
    images = torch.stack([read_pixels(file) for file in list_images(noise_images)[:8]])
    pixels = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    steps = v1.Compose([v1.ToTensor(), v1.Normalize(*pixels)])
    expected = torch.stack([steps(Image.open(file)) for file in list_images(noise_images)[:8]])
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        found = normalize(images.to(device), pixels).cpu()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert torch.equal(found, normalize(images, pixels))
        assert torch.equal(found[3:5], normalize(images[3:5], pixels))
    assert images.dtype == torch.uint8


def test_mean_and_std_are_made_once_for_a_device():
    """Made from lists for each batch, they would be copied to the GPU and waited for."""
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(str(function))
            return function(*args, **(kwargs or {}))

    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with Watch():
        normalize(images, ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5)))
        assert "aten.lift_fresh.default" in made
        made.clear()
        normalize(images, ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5)))
        assert made
        assert "aten.lift_fresh.default" not in made


def test_nothing_is_normalised_twice():
    with pytest.raises(TypeError, match="normalised once"):
        normalize(normalize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)))


def test_pieces_of_shared_memory_are_copied_before_they_are_written_again(noise_images):
    """Many more batches than pieces, all kept: each is what one process alone reads."""
    files = list_images(noise_images)
    dataset = Images(files, pretraining_transform(32), seed=5)
    stream = TrainingStream(len(files), 8, 8, 5, 0, 40)
    alone = [images for images, _, _ in loader(dataset, stream, 0, "cpu")]
    shared = [images for images, _, _ in loader(dataset, stream, 2, "cpu")]
    assert len(alone) == len(shared) == 40
    assert all(torch.equal(*pair) for pair in zip(alone, shared))
    assert len({images.data_ptr() for images in shared}) == 40
    turns = InTurn(dataset, torch.zeros(8, 3, 32, 32, dtype=torch.uint8), 2)
    for number, samples in Numbered(stream.__iter__()):
        placed, _, _ = data.collate(turns.__getitems__((number, samples)))
        assert torch.equal(placed.images(), alone[number])
        assert placed.images().data_ptr() == turns.pieces[number % 2].data_ptr()
    (last,) = [turns.__getitems__((0, samples[:3]))]
    assert torch.equal(data.collate(last)[0].images(), alone[39][:3])
    assert isinstance(data.collate(turns.__getitems__((0, samples + samples)))[0], torch.Tensor)  # too many for a piece
