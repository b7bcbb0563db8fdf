"""Checkpoints that hypothesis makes of a good one: the truth, or a sentence; never anything else."""

import itertools
import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from mae_core.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from tests.campaign.cases import Broken, Case, require
from tests.fixtures.checkpoint import ENCODER, TRUNK

NAMES = sorted(ENCODER)
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool,
    torch.complex64, torch.uint8, torch.float8_e4m3fn,
)  # fmt: skip
FLOATS = {torch.float32, torch.float64, torch.float16, torch.bfloat16}  # what weights come in
PREFIXES = ("model.", "module.", "encoder.", "backbone.", "student.", "x.", "model.model.", "vit.", "visual.", "", ".")
SIZES = st.integers(0, 70)
KIND = "bad input: checkpoints, generated"


def outcome(path: Path) -> Checkpoint | None:
    """What a file is read as; None where it is refused in one sentence."""
    try:
        return read_checkpoint(path)
    except CheckpointError as e:
        require("\n" not in str(e) and 20 < len(str(e)) < 2000, f"no sentence: {str(e)[:300]}")
        return None
    except Exception as e:
        raise Broken(f"{type(e).__name__}: {str(e)[:300]}") from e


def same(one: Tensor, other: Tensor, atol: float = 0.0) -> bool:
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), atol=atol, rtol=0)


def put(folder: Path, state: dict[str, Tensor], legacy: bool = False) -> Path:
    """legacy: as a .pth, which can hold what safetensors cannot."""
    path = folder / ("a.pth" if legacy else "a.safetensors")
    torch.save({"model": state}, path) if legacy else save_file(state, path)
    return path


def subset(folder: Path, data: st.DataObject) -> None:
    """Some tensors are missing: refused, but for whole blocks at the end, which make a smaller encoder, or a norm that
    an averaging classifier has elsewhere."""
    dropped = data.draw(st.sets(st.sampled_from(NAMES), min_size=1, max_size=len(NAMES) - 1))
    left = {name: tensor for name, tensor in ENCODER.items() if name not in dropped}
    found = outcome(put(folder, left))
    require(found is None, f"accepted without {sorted(dropped)[:5]}")


def shape(folder: Path, data: st.DataObject) -> None:
    """One tensor has another shape. Only the positions may: of a square grid, they are those of another image size."""
    name = data.draw(st.sampled_from(NAMES))
    sizes = data.draw(st.lists(SIZES, max_size=5))
    if list(ENCODER[name].shape) == sizes:
        return
    found = outcome(put(folder, {**ENCODER, name: torch.zeros(sizes)}))
    square = name == "pos_embed" and len(sizes) == 3 and sizes[0] == 1 and sizes[2] == 128
    grid = square and sizes[1] - 1 in {n * n for n in range(1, 9)}
    require(found is None or grid, f"accepted {name} of shape {sizes}")


def dtype(folder: Path, data: st.DataObject) -> None:
    """Tensors of other number types: read as the same numbers, or refused."""
    changed = data.draw(st.sets(st.sampled_from(NAMES), min_size=1))
    kind = data.draw(st.sampled_from(DTYPES))
    state = {name: tensor.to(kind) if name in changed else tensor for name, tensor in ENCODER.items()}
    found = outcome(put(folder, state, legacy=kind in (torch.complex64, torch.float8_e4m3fn)))
    require(found is not None or kind not in FLOATS, f"{kind} is refused")
    if found is not None:
        require(kind.is_floating_point, f"{kind} is accepted as weights")
        require(all(same(found.encoder[n], state[n]) for n in NAMES), f"{kind} changed the numbers")


def prefix(folder: Path, data: st.DataObject) -> None:
    """Names with prefixes, all or only some: the truth, or refused."""
    chosen = "".join(data.draw(st.lists(st.sampled_from(PREFIXES), max_size=3)))
    some = data.draw(st.one_of(st.none(), st.sets(st.sampled_from(NAMES))))
    state = {chosen + name if some is None or name in some else name: tensor for name, tensor in ENCODER.items()}
    found = outcome(put(folder, state))
    truth = found is None or (
        found.encoder.keys() == ENCODER.keys() and all(same(found.encoder[n], ENCODER[n]) for n in NAMES)
    )
    require(truth, f"accepted as something else with the prefix {chosen!r}")


def names(folder: Path, data: st.DataObject) -> None:
    """One tensor has any other name."""
    name = data.draw(st.sampled_from(NAMES))
    other = data.draw(st.one_of(st.text(max_size=40), st.sampled_from([n + "x" for n in NAMES])))
    if other in ENCODER:
        return
    state = {other if n == name else n: tensor for n, tensor in ENCODER.items()}
    found = outcome(put(folder, state, legacy=True))
    require(found is None, f"accepted with {name} called {other!r}")


def more(folder: Path, data: st.DataObject) -> None:
    """A tensor too many: named among the dropped ones, or refused."""
    other = data.draw(
        st.one_of(st.text(min_size=1, max_size=30), st.sampled_from(["blocks.6.attn.qkv.weight", "head.weight"]))
    )
    if other in ENCODER:
        return
    found = outcome(put(folder, {**ENCODER, other: torch.zeros(data.draw(st.lists(SIZES, max_size=3)))}, legacy=True))
    if found is not None:
        known = {*found.dropped, *found.classifier, *found.encoder}
        require(all(same(found.encoder[n], ENCODER[n]) for n in NAMES), f"changed by a further tensor {other!r}")
        require(any(other.endswith(name) or name.endswith(other) for name in known), f"{other!r} is dropped in silence")


def values(folder: Path, data: st.DataObject) -> None:
    """Numbers that are not finite."""
    name = data.draw(st.sampled_from(NAMES))
    tensor = ENCODER[name].clone()
    tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(
        st.sampled_from([float("nan"), float("inf")])
    )
    require(outcome(put(folder, {**ENCODER, name: tensor})) is None, f"{name} with a number that is not finite")


def header(folder: Path, data: st.DataObject) -> None:
    """The header of a safetensors file is changed: the truth, or refused."""
    whole = save(ENCODER)
    length = struct.unpack("<Q", whole[:8])[0]
    content = json.loads(whole[8 : 8 + length])
    name = data.draw(st.sampled_from(NAMES))
    value = data.draw(
        st.recursive(st.none() | st.integers() | st.text(max_size=5) | st.floats(), st.lists, max_leaves=4)
    )
    content[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = value
    changed = json.dumps(content).encode()
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + whole[8 + length :])
    require(outcome(path) is None, f"a header whose {name} has {value!r}")


def damage(folder: Path, data: st.DataObject) -> None:
    """Files cut, or with some bytes replaced: of a safetensors file, which has no checksum, only in its header, since a
    changed weight cannot be told from another one."""
    legacy = data.draw(st.booleans())
    path = put(folder, TRUNK | ENCODER, legacy)
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        require(outcome(path) is None, "a file that was cut")
        return
    at = data.draw(st.integers(0, len(whole) - 40 if legacy else 5000))
    path.write_bytes(whole[:at] + data.draw(st.binary(min_size=1, max_size=32)) + whole[at + 32 :])
    found = outcome(path)
    require(found is None or not legacy or all(same(found.encoder[n], ENCODER[n]) for n in NAMES), "damage is accepted")


def run(what: Callable[[Path, st.DataObject], None], examples: int, number: int, work: Path) -> None:
    counter = itertools.count()

    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate], print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        folder = work / str(next(counter))
        folder.mkdir()
        what(folder, data)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()

    tried()


def cases(number: int, examples: int) -> list[Case]:
    made = (subset, shape, dtype, prefix, names, more, values, header, damage)
    return [
        Case(
            KIND,
            f"{what.__name__}: {what.__doc__.split(':')[0]}",
            partial(run, what, examples, number),
            small=True,
            tries=examples,
        )
        for what in made
    ]
