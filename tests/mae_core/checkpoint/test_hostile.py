"""Files that are damaged, or made to hang, to fill the memory or to run code: a checkpoint equal to the truth or one
sentence, never anything else."""

import io
import os
import pickle
import random
import signal
import zipfile

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint import format_utils

from mae_core.checkpoint import CheckpointError, read_checkpoint, read_state
from mae_core.checkpoint.convert import read_weights
from tests.fixtures.checkpoint import (
    DECODER,
    ENCODER,
    PLAIN_VIT,
    Attack,
    beit,
    equal,
    folder,
    hf,
    mm,
    prefixed,
)

FEW = {"blocks.0.norm1.weight": torch.arange(6.0), "blocks.0.norm1.bias": torch.ones(2, 3), "cls_token": torch.ones(4)}


@pytest.fixture(autouse=True)
def alarm():
    """What hangs fails after a minute."""

    def ring(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(path):
    """The sentence with which a file is refused."""
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1100
    return str(error.value)


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_sixteen_damaged_bytes_anywhere_in_a_zip_file_are_noticed_or_harmless(put, step):
    path, draw = put({"model": FEW, "epoch": 3}), random.Random(0)
    whole, refused = path.read_bytes(), 0
    table = range(len(whole) - 150, len(whole) - 15)  # the end of the table of contents
    for start in sorted({*range(0, len(whole) - 15, step), *table}):
        path.write_bytes(whole[:start] + draw.randbytes(16) + whole[start + 16 :])
        try:
            assert equal(read_weights(path).tensors, FEW)  # in the padding between the records
        except CheckpointError:
            refused += 1
    assert refused > 0.5 * len(whole) / step


@pytest.mark.parametrize("kind", ["old.pth", "plain.pkl", "flat.safetensors", "flat.npz"])
def test_sixteen_damaged_bytes_in_any_other_file_raise_nothing_else(put, kind):
    content = {"model": FEW}
    if kind == "plain.pkl":
        content = pickle.dumps({"model": {name: tensor.numpy() for name, tensor in FEW.items()}})
    elif kind.startswith("flat"):
        content = FEW if kind.endswith("safetensors") else {name: tensor.numpy() for name, tensor in FEW.items()}
    path = put(content, kind, **({"_use_new_zipfile_serialization": False} if kind == "old.pth" else {}))
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for start in range(0, len(whole) - 15, 3):
        path.write_bytes(whole[:start] + draw.randbytes(16) + whole[start + 16 :])
        try:
            read_weights(path)
        except CheckpointError:
            refused += 1
    assert refused > 20


def test_zeros_inside_a_weight_are_noticed_by_the_checksum(put):
    path = put({"model": ENCODER})
    good = bytearray(path.read_bytes())
    at = good.find(ENCODER["blocks.3.mlp.fc1.weight"].numpy().tobytes())
    damaged = good[:at] + bytes(4096) + good[at + 4096 :]
    path.write_bytes(damaged)
    torch.load(path, weights_only=True)  # which does not look
    assert "its checksum of file/data/" in refusal(path)
    with pytest.raises(CheckpointError, match="checksum"):
        read_state(path)
    path.write_bytes(good)
    assert equal(read_state(path)["model"], ENCODER)


def test_a_file_that_was_saved_without_checksums_is_read(put):
    torch.serialization.set_crc32_options(False)
    try:
        path = put({"model": ENCODER})
    finally:
        torch.serialization.set_crc32_options(True)
    assert {member.CRC for member in zipfile.ZipFile(path).infolist()} == {0}
    assert equal(read_checkpoint(path).encoder, ENCODER)


def test_archives_whose_table_contradicts_itself_are_refused(put, tmp_path):
    path = put({"model": FEW})
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for member in archive.namelist():
            other.writestr(member, archive.read(member))
    assert "compressed zip archive" in refusal(packed)  # torch would map the packed bytes as numbers
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("file/data/0", bytes(24))
    assert "contradicts itself" in refusal(path)


def test_archives_are_not_unpacked_to_more_than_they_may_be(put, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "load", None)
    bomb = tmp_path / "bomb.npz"
    np.savez_compressed(bomb, a=np.zeros(2**20))
    assert "would unpack to 8,388,736 bytes" in refusal(bomb)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(bomb, "w") as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(64))
    assert "a.npy is not as long as its header says" in refusal(bomb)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", "/dev/zero"):
        assert f"{path} is a pipe or a device, not a file" in refusal(path)
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        read_state(tmp_path / "pipe.pth")


LONG = ("x" * 300, "File name too long")


@pytest.mark.parametrize(("name", "said"), [LONG, ("a\0b.pth", "null"), ("~nobody-here/x", "home")])
def test_paths_that_cannot_be_are_a_sentence(name, said):
    assert said in refusal(name)


def test_a_name_that_is_not_utf_8_is_a_sentence(put, tmp_path):
    for name in ("a.pth", "a.safetensors"):
        path = put(ENCODER, name).rename(tmp_path / f"caf\udce9{name}")
        assert "its name is not UTF-8" in refusal(path)


def test_a_link_to_itself_is_a_sentence(tmp_path):
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    assert "loop" in refusal(tmp_path / "loop.pth")


EXPANDED = torch.zeros(1, 1).expand(10**9, 100)
HALF = torch.zeros(1, 1).half().expand(10**9, 100)
HUGE = {
    "an expanded decoder": ({**ENCODER, **DECODER, "decoder_embed.weight": EXPANDED}, "expanded (100,0"),
    "an expanded half": ({**ENCODER, "blocks.0.mlp.fc1.weight": HALF}, "fc1.weight are expanded"),
    "expanded queries": (hf(ENCODER) | {"encoder.layer.0.attention.attention.query.weight": EXPANDED}, "expanded"),
    "a number of 5,000 digits": ({**ENCODER, f"blocks.{'1' * 5000}.norm1.weight": torch.ones(1)}, "does not have"),
    "a number above 9999": ({**ENCODER, "blocks.12345.norm1.weight": torch.ones(128)}, "has blocks.12345.norm1.weight"),
    "foreign digits": ({**ENCODER, "blocks.٣.norm1.weight": torch.ones(128)}, "does not have"),
    "unprintable names": ({**ENCODER, "blocks.5.\x1b[2J\u202e\ud800\n": torch.ones(1)}, r"\x1b[2J"),
    "a token to broadcast": (
        {**ENCODER, "register_tokens": torch.zeros(1, 4, 128), "cls_token": torch.zeros(99999, 1, 1)},
        "no complete dinov2-registers file",
    ),
    "sparse queries": (
        hf(ENCODER) | {"encoder.layer.0.attention.attention.query.weight": torch.eye(128).to_sparse()},
        "cannot be joined",
    ),
    "a projection that is one number": ({**ENCODER, "patch_embed.proj.weight": torch.tensor(1.0)}, "unknown size"),
    "a table that is one number": (
        {**beit().state_dict(), "blocks.0.attn.relative_position_bias_table": torch.tensor(1.0)},
        "relative_position_bias_table is []",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HUGE)
def test_tensors_that_would_fill_the_memory_and_odd_names_are_refused(put, case):
    state, message = HUGE[case]
    assert message in refusal(put({"model": state}))


def test_the_same_tensor_under_two_names_is_not_expanded(put):
    state = {**ENCODER, "norm.weight": ENCODER["norm.bias"], "other": ENCODER["blocks.0.mlp.fc1.weight"][:9]}
    assert equal(read_checkpoint(put({"model": state})).encoder, {**ENCODER, "norm.weight": ENCODER["norm.bias"]})


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"decoder_heads": "many"}, "decoder_heads=many is no number of heads"),
        ({"decoder_heads": "0"}, "decoder_heads=0"),
        ({"decoder_heads": "9" * 5000}, "is no number of heads"),
        ({"kind": "banana"}, "kind=banana is none of encoder"),
        ({"mean": "1 2", "std": "1 1 1", "eps": "1e-6", "pool": "avg"}, "nothing can be normalised by mean (1.0, 2.0)"),
        ({"mean": "0 0 nan", "std": "1 1 1", "eps": "1e-6", "pool": "avg"}, "nothing can be normalised"),
        ({"mean": "0 0 0", "std": "1 1 0", "eps": "1e-6", "pool": "avg"}, "std (1.0, 1.0, 0.0)"),
        ({"mean": "0 0 0", "std": "1 1 1", "eps": "inf", "pool": "avg"}, "eps inf"),
        ({"mean": "0 0 0", "std": "1 1 1", "eps": "1e-6", "pool": "max"}, "pool=max is neither token nor avg"),
    ],
)
def test_metadata_that_means_nothing_is_refused(put, metadata, said):
    assert said in refusal(put(ENCODER, "a.safetensors", metadata={"format": "mae-transfer", **metadata}))


def test_metadata_of_others_is_theirs(put):
    path = put(ENCODER, "a.safetensors", metadata={"kind": "vit", "epochs": "9" * 5000})
    checkpoint = read_checkpoint(path)
    assert (checkpoint.kind, checkpoint.meta["epochs"]) == ("encoder", "9" * 5000)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"num_attention_heads": Infinity}', "num_attention_heads is inf"),
        ('{"num_attention_heads": 4.5}', "num_attention_heads is 4.5"),
        ('{"num_attention_heads": [4]}', "num_attention_heads is [4]"),
        ('{"layer_norm_eps": NaN}', "eps nan"),
        ('{"layer_norm_eps": 1' + 400 * "0" + "}", "too large"),
        ('{"layer_norm_eps": 1' + 5000 * "0" + "}", "is no JSON file"),
        ('{"image_mean": [0, 0, Infinity]}', "mean (0.0, 0.0, inf)"),
        ('{"image_std": [1, 1, 0]}', "std (1.0, 1.0, 0.0)"),
        ("[" * 100_000, "is no JSON file"),
        ('{"a":' * 100_000, "is no JSON file"),
    ],
)
def test_configs_that_mean_nothing_are_refused(tmp_path, config, said):
    path = folder(tmp_path / "m", hf(PLAIN_VIT))
    (path / "config.json").write_text(config)
    assert said in refusal(path)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."])
def test_wrappers_are_stripped_at_any_depth(put, wrapper):
    other = "_checkpoint_wrapped_module._fsdp_wrapped_module."
    inner = {
        name.replace("blocks.0.", f"blocks.0.{wrapper}").replace("attn.", f"attn.{other}"): t
        for name, t in ENCODER.items()
    }
    assert len(inner.keys() - ENCODER.keys()) > 12
    for state in (
        inner,
        prefixed(inner, wrapper),
        prefixed(inner, f"module.{wrapper}"),
        prefixed(inner, f"backbone.{wrapper}"),
    ):
        checkpoint = read_checkpoint(put({"state_dict": state}))
        assert equal(checkpoint.encoder, ENCODER)
        assert checkpoint.dropped == ()
    both = {**inner, "blocks.0.norm1.weight": ENCODER["blocks.0.norm1.weight"]}
    assert "two entries are blocks.0.norm1.weight, with a wrapper's prefix and without" in refusal(put({"model": both}))


def test_fsdp_s_parts_say_how_they_become_one_file(put, tmp_path):
    for name in ("_fsdp_wrapped_module._flat_param", "blocks.3._flat_param", "blocks.0.flat_param_0"):
        said = refusal(put({"model": {**ENCODER, name: torch.zeros(99)}}))
        assert "FSDP's flat parameters" in said
        assert "FULL_STATE_DICT" in said
    parts = tmp_path / "step-100"
    torch.distributed.checkpoint.save({"model": dict(ENCODER)}, checkpoint_id=parts, no_dist=True)
    for path in (parts, parts / "__0_0.distcp"):
        assert f"{parts} is a sharded checkpoint" in refusal(path)
        assert "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUT.pth" in refusal(path)
    format_utils.dcp_to_torch_save(parts, tmp_path / "one.pth")
    assert equal(read_checkpoint(tmp_path / "one.pth").encoder, ENCODER)


def hand_made(dtype="f4", order="<", flags=0, shape=(2, 3), memo=0):
    """A pickle of {"model": {"cls_token": array of 0..5}} with the array's parts as given, text by text."""
    sizes = "".join(f"I{side}\n" for side in shape)
    kind = f"cnumpy\ndtype\n(V{dtype}\nI0\nI1\ntR(I3\nV{order}\nNNNI-1\nI-1\nI{flags}\ntb"
    start = "\x80\x02}Vmodel\n}Vcls_token\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"
    data = np.arange(6, dtype=f"{order}f4").tobytes()
    body = f"(I1\n({sizes}t{kind}I00\n".encode() + b"T" + len(data).to_bytes(4, "little") + data + b"tb"
    return start.encode("latin1") + b"r" + memo.to_bytes(4, "little") + body + b"ss."


@pytest.mark.parametrize("order", ["<", ">"])
def test_arrays_are_read_by_their_bytes_alone(put, order):
    expected = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(read_weights(put(hand_made(order=order), "a.pkl")).tensors["cls_token"], expected)
    # To numpy's own unpickling these say that the numbers are pointers, and to pickle's memo to fill 32 GB.
    for hostile in (hand_made(order=order, flags=63), hand_made(order=order, memo=2**31 - 1)):
        assert torch.equal(read_weights(put(hostile, "a.pkl")).tensors["cls_token"], expected)
    for damaged in (hand_made(shape=(10**6, 10**6)), hand_made(shape=(-1, 0)), hand_made(dtype="f8")):
        assert "damaged" in refusal(put(damaged, "a.pkl"))
    assert "no named tensors" in refusal(put(hand_made(dtype="O8"), "a.pkl"))


@pytest.mark.parametrize("way", ["zip", "old pickle"])
def test_code_in_a_saved_training_never_runs(put, tmp_path, way):
    target = tmp_path / "attacked"
    path = put({"model": {}, "state": Attack(target)}, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(CheckpointError):
        read_state(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # on purpose: an attack that does nothing anyway would prove nothing
    assert target.exists()  # the attack is real


# What real files differ in, drawn at random: each is read as the truth. And what makes them useless: each is refused.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CONTAINERS = ("flat.pth", "model.pth", "state_dict.pth", "old.pth", "flat.safetensors", "plain.pkl")
PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "backbone.", "encoder.vit.", "_fsdp_wrapped_module.")


def drawn(draw):
    """A valid checkpoint in a random form: what holds it, its entries in random order, the truth by canonical name."""
    dtype, container = draw.choice(DTYPES), draw.choice(CONTAINERS)
    if container == "plain.pkl" and dtype is torch.bfloat16:  # which numpy does not know
        dtype = torch.float16
    stored = {name: tensor.to(dtype) for name, tensor in ENCODER.items()}
    truth = {name: tensor.float() for name, tensor in stored.items()}
    entries = draw.choice((dict, hf, mm))(stored)
    entries = prefixed(entries, draw.choice(PREFIXES) if next(iter(entries)) in ENCODER else "")
    junk = {"fc.weight": torch.ones(3), "step_count": torch.tensor(3), "epoch": 7, "name": "vit", "nothing": None}
    for name in draw.sample(sorted(junk), draw.randrange(3)):
        if isinstance(junk[name], torch.Tensor) or not container.startswith(("flat.s", "plain")):
            entries[name] = junk[name]
    order = list(entries.items())
    draw.shuffle(order)
    return container, dict(order), truth


def written(put, container, entries):
    kind = container.partition(".")[0]
    if container == "plain.pkl":
        return put(pickle.dumps({"model": {name: tensor.numpy() for name, tensor in entries.items()}}), container)
    content = {kind: entries} if kind in ("model", "state_dict") else {"model": entries} if kind == "old" else entries
    if container.endswith("safetensors"):
        content = {name: tensor.contiguous().clone() for name, tensor in entries.items()}
    return put(content, container, **({"_use_new_zipfile_serialization": False} if kind == "old" else {}))


def broken(draw, entries):
    """The entries with one thing done to one tensor of the encoder that makes the file useless; what was done."""
    name = draw.choice(sorted(n for n, t in entries.items() if isinstance(t, torch.Tensor) and t.numel() > 100))
    tensor = entries[name]
    ways = {
        "absent": None,
        "flat": tensor.flatten()[:-1],
        "scalar": tensor.flatten()[0].clone(),
        "grown": torch.cat([tensor, tensor[:1]]),
        "empty": tensor[:0],
        "one more axis": tensor[None],
        "integers": tensor.to(torch.int32),
        "not finite": torch.full_like(tensor, draw.choice((float("nan"), float("inf")))),
        "renamed": None,
    }
    way = draw.choice(sorted(ways))
    changed = {n: t for n, t in entries.items() if n != name}
    if way == "renamed":
        changed[f"{name}_{draw.randrange(10)}"] = tensor
    elif ways[way] is not None:
        changed[name] = ways[way]
    return changed, f"{way} {name}"


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_random_files_are_the_truth_or_a_sentence(put, seed):
    draw = random.Random(seed)
    for number in range(12 if seed == 0 else 60):
        container, entries, truth = drawn(draw)
        path = written(put, container, entries)
        checkpoint = read_checkpoint(path)
        assert equal(checkpoint.encoder, truth), (number, container, list(entries)[:3])
        changed, what = broken(draw, entries)
        path = written(put, container, changed)
        assert str(path) in refusal(path), (number, container, what)
