import io
import tarfile

import numpy as np
import pytest
import torch

from mae_core.data import EXTENSIONS, images_or_shards
from mae_core.decode import read_image, read_pixels
from mae_core.errors import UserError
from mae_core.shards import list_members, list_shards


def pack(path, files, mode="w"):
    """A tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shards(noise_images, tmp_path):
    """The 64 images in three shards, with what webdataset puts beside them."""
    files = sorted(noise_images.iterdir())
    for number, part in enumerate((files[:30], files[30:33], files[33:])):
        pairs = [(file.name, file.read_bytes()) for file in part]
        pack(tmp_path / "shards" / f"{number:04}.tar", [p for pair in pairs for p in (pair, (pair[0] + ".cls", b"3"))])
    return tmp_path / "shards"


def test_every_image_is_read_as_from_its_file_and_in_any_order(noise_images, shards):
    entries = images_or_shards(shards)
    files = sorted(noise_images.iterdir())
    assert len(entries) == 64
    for number in (63, 0, 31, 30, 5):
        assert files[number].name in entries[number]
        assert np.array_equal(read_image(entries[number]), read_image(files[number]))
        assert torch.equal(read_pixels(entries[number]), read_pixels(files[number]))


def test_links_folders_and_other_files_are_passed_over(tmp_path):
    path = pack(tmp_path / "a.tar", [("folder/1.jpg", b"x" * 700), ("note.txt", b"y"), ("2.PNG", b"zz")])
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("3.jpg")
            member.type, member.linkname = kind, "2.PNG"
            tar.addfile(member)
    entries = list_members([path], EXTENSIONS)
    # A header of 512 bytes before each, contents padded to 512: 512; 512 + 1024 + 512 + 512 + 512.
    assert entries == [f"{path}!/folder/1.jpg@512+700", f"{path}!/2.PNG@3072+2"]


def test_shards_are_found_at_any_depth_in_order(tmp_path):
    for name in ("b/2.tar", "a/9.tar", "1.tar"):
        pack(tmp_path / name, [("x.jpg", b"1")])
    assert list_shards(tmp_path) == [tmp_path / name for name in ("1.tar", "a/9.tar", "b/2.tar")]


def test_a_compressed_or_damaged_tar_is_refused(tmp_path):
    packed = pack(tmp_path / "packed.tar", [("a.jpg", b"1" * 100)], "w:gz")
    with pytest.raises(UserError, match=r"packed.tar cannot be read as an uncompressed tar file .*: pack it again"):
        list_members([packed], EXTENSIONS)
    whole = pack(tmp_path / "whole.tar", [("a.jpg", b"1" * 5000)])
    whole.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"whole.tar (is cut short: copy it again|cannot be read .* data)"):
        list_members([whole], EXTENSIONS)


def test_empty_shards_and_loose_images_beside_shards_are_refused(tmp_path, noise_images):
    pack(tmp_path / "a.tar", [("note.txt", b"1")])
    with pytest.raises(UserError, match=r"no image \(.*\) in .*a.tar"):
        images_or_shards(tmp_path)
    pack(tmp_path / "a.tar", [("a.jpg", b"1")])
    (tmp_path / "b.jpg").write_bytes(b"1")
    with pytest.raises(UserError, match=r"has both tar files \(a.tar\) and loose images \(.*b.jpg\): keep them apart"):
        images_or_shards(tmp_path)
