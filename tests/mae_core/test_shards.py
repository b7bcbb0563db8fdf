import io
import tarfile

import numpy as np
import pytest
import torch

from mae_core.decode import read_image, read_pixels
from mae_core.errors import UserError
from mae_core.listing import images_or_shards
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
    entries = list_members([path])
    # A header of 512 bytes before each, contents padded to 512: 512; 512 + 1024 + 512 + 512 + 512.
    assert entries == [f"{path}!/folder/1.jpg@512+700", f"{path}!/2.PNG@3072+2"]


def test_shards_are_found_at_any_depth_in_order(tmp_path):
    for name in ("b/2.tar", "a/9.tar", "1.tar"):
        pack(tmp_path / name, [("x.jpg", b"1")])
    assert list_shards(tmp_path) == [tmp_path / name for name in ("1.tar", "a/9.tar", "b/2.tar")]


def test_a_compressed_tar_is_refused(tmp_path):
    packed = pack(tmp_path / "packed.tar", [("a.jpg", b"1" * 100)], "w:gz")
    with pytest.raises(UserError, match=r"packed.tar cannot be read as an uncompressed tar file .*: pack it again"):
        list_members([packed])


def whole_tar(tmp_path, name="whole.tar", count=5):
    """Images of one block each: a header every 1024 bytes."""
    return pack(tmp_path / name, [(f"{number}.jpg", b"1" * 500) for number in range(count)])


@pytest.mark.parametrize("length", [0, 700, 1500, 2048, 2300, 5 * 1024, 5 * 1024 + 600])
def test_a_tar_cut_anywhere_is_refused(tmp_path, length):
    """In a content, between two members, in a header, and in the mark of the end."""
    whole = whole_tar(tmp_path)
    whole.write_bytes(whole.read_bytes()[:length])
    with pytest.raises(UserError, match=r"whole.tar (is cut short|is damaged|cannot be read)"):
        list_members([whole])


@pytest.mark.parametrize("member", range(5))
def test_a_tar_with_a_damaged_header_is_refused(tmp_path, member):
    whole = whole_tar(tmp_path)
    content = bytearray(whole.read_bytes())
    content[1024 * member + 100 : 1024 * member + 108] = bytes(8)
    whole.write_bytes(content)
    with pytest.raises(UserError, match=r"whole.tar (is damaged at byte|cannot be read)"):
        list_members([whole])


def test_tars_in_one_file_are_refused(tmp_path):
    first, second = whole_tar(tmp_path, "a.tar", 2), whole_tar(tmp_path, "b.tar", 3)
    length = first.stat().st_size
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UserError, match=rf"a.tar goes on after its end, at byte {length} .*: keep them apart"):
        list_members([first])


def test_an_image_stored_with_holes_is_refused(tmp_path):
    path = pack(tmp_path / "a.tar", [("1.jpg", b"x")])
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("1.jpg")
        content = b"1\n0\n3\n".ljust(512, b"\0") + b"abc"
        member.size = len(content)
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "1.jpg"}
        tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match=r"a.tar stores 1.jpg with holes"):
        list_members([path])


def test_empty_shards_and_loose_images_beside_shards_are_refused(tmp_path, noise_images):
    pack(tmp_path / "a.tar", [("note.txt", b"1")])
    with pytest.raises(UserError, match=r"no image \(.*\) in .*a.tar"):
        images_or_shards(tmp_path)
    pack(tmp_path / "a.tar", [("a.jpg", b"1")])
    (tmp_path / "b.jpg").write_bytes(b"1")
    with pytest.raises(UserError, match=r"has both tar files \(a.tar\) and loose images \(.*b.jpg\): keep them apart"):
        images_or_shards(tmp_path)
