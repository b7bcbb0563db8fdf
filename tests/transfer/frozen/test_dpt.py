"""DPT's head: mmsegmentation's with the same weights, and a job with it."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.verify import verify
from mae_core.machine import Machine
from mae_core.vit import build_vit
from tests.fixtures.miniature import write_few
from tests.fixtures.transfer import (
    ARCH,
    assert_objection_is_right,
    assert_resumed_is_undisturbed,
    assert_space_is_right,
    small_checkpoint,
)
from transfer.data.nyu import FOLDER, pairs, read_depth
from transfer.frozen import depth
from transfer.frozen.dpt import DPT, START, DPTRecipe, sources, tokens_of
from transfer.frozen.segment import HEAD_FILE
from transfer.frozen.tasks import NYU_DPT, NYU_LINEAR
from transfer.miniature import depth as miniature
from transfer.run import run_job
from transfer.segmentation.mmseg_plugin import provide_operators
from transfer.task import RECORD_FILE, Job

LITTLE = {"image_size": 48, "stride": 32, "batch": 4, "iterations": 4, "warmup_iterations": 1, "channels": 8}
# Beginnings of mmsegmentation's names, and ours.
NAMES = {
    "reassemble_blocks.projects.{}.conv": "projections.{}",
    "reassemble_blocks.resize_layers.{}": "scalings.{}",
    "reassemble_blocks.readout_projects.{}.0": "readouts.{}.0",
    "convs.{}.conv": "entries.{}",
    "project.conv": "joined.0",
}
FUSED = {
    "res_conv_unit1.conv1.conv": "before.1",
    "res_conv_unit1.conv2.conv": "before.3",
    "res_conv_unit2.conv1.conv": "after.1",
    "res_conv_unit2.conv2.conv": "after.3",
    "project.conv": "project",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_few(miniature.nyu, tmp_path_factory.mktemp("depth"), 8, 3)


def job_of(root, work, machine=None, **knobs) -> Job:
    recipe = DPTRecipe(**vars(NYU_DPT.recipe(ARCH, "mini")) | LITTLE | knobs)
    data = NYU_DPT.inspect(root)
    return Job(NYU_DPT, small_checkpoint(), recipe, "mini", knobs, data, work, machine=machine or Machine(), out=work)


@pytest.mark.filterwarnings("ignore")  # mmsegmentation's own
@pytest.mark.parametrize("side", [4, 3])
def test_the_joined_map_is_mmsegmentations(side):
    """An odd number of patches too, where the coarsest map is rounded up."""
    provide_operators()
    from mmseg.models.decode_heads.dpt_head import DPTHead

    torch.manual_seed(0)
    dim, channels = 32, 8
    theirs = DPTHead(
        embed_dims=dim,
        post_process_channels=[dim // 8, dim // 4, dim // 2, dim],
        readout_type="project",
        in_channels=[dim] * 4,
        channels=channels,
        in_index=[0, 1, 2, 3],
        input_transform="multiple_select",
        num_classes=2,
        norm_cfg=None,
        act_cfg={"type": "ReLU"},
    ).eval()
    theirs.conv_seg, theirs.dropout = torch.nn.Identity(), None
    given, state, ours = theirs.state_dict(), {}, DPT(dim, channels)
    for name, tensor in given.items():
        start, _, last = name.rpartition(".")
        number = next((part for part in start.split(".") if part.isdigit()), "")
        known = {key.format(number): ours_.format(number) for key, ours_ in NAMES.items()}
        # Their first fusion block has the coarsest map, ours the last one.
        known |= {
            f"fusion_blocks.{i}.{key}": f"fusions.{3 - i}.{value}" for i in range(4) for key, value in FUSED.items()
        }
        state[f"{known[start]}.{last}"] = tensor
    own = {name: tensor for name, tensor in ours.state_dict().items() if name.startswith(("narrow", "metres"))}
    ours.load_state_dict(state | own)
    tokens = torch.randn(2, 4, 1 + side * side, dim)
    maps = [(t[:, 1:].mT.unflatten(2, (side, side)), t[:, 0]) for t in tokens.unbind(1)]
    joined = ours.maps(tokens)
    assert joined.shape == (2, channels, 16 * -(-side // 2), 16 * -(-side // 2))
    torch.testing.assert_close(joined, theirs(maps), rtol=1e-4, atol=1e-5)


def test_the_last_layers_are_dinov2s():
    """Of its HeadDepth: a convolution to half the channels, twice the size with the corners in place, one to 32
    channels, ReLU, one to depth; then ReLU and 1 mm."""
    torch.manual_seed(0)
    head, tokens = DPT(32, 8), torch.randn(2, 4, 1 + 16, 32)
    torch.nn.init.normal_(head.metres[2].weight)
    x = head.maps(tokens)
    x = F.interpolate(
        F.conv2d(x, head.narrow.weight, head.narrow.bias, padding=1), size=(64, 64), mode="bilinear", align_corners=True
    )
    x = F.relu(F.conv2d(x, head.metres[0].weight, head.metres[0].bias, padding=1))
    x = F.conv2d(x, head.metres[2].weight, head.metres[2].bias)
    torch.testing.assert_close(head(tokens), F.relu(x) + 1e-3)
    assert head(tokens).shape == (2, 1, 64, 64)


def test_it_computes_in_float32_under_autocast():
    torch.manual_seed(0)
    head, tokens = DPT(32, 8), torch.randn(2, 4, 1 + 16, 32)
    torch.nn.init.normal_(head.metres[2].weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(tokens)
    assert found.dtype == torch.float32
    assert torch.equal(found, head(tokens))
    assert not torch.equal(found, found.bfloat16().float())


def test_it_starts_where_it_can_learn():
    """At 2 m, whatever the tokens: the last ReLU gives 0 for none, and after two steps every parameter has moved."""
    for scale in (1, 100):
        torch.manual_seed(0)
        head, tokens, truth = DPT(32, 8), scale * torch.randn(2, 4, 1 + 16, 32), torch.full((2, 64, 64), 3.0)
        torch.testing.assert_close(head(tokens), torch.full((2, 1, 64, 64), START + 1e-3))
        before = [p.detach().clone() for p in head.parameters()]
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-4, weight_decay=0)
        for _ in range(2):
            optimizer.zero_grad()
            depth.scale_invariant(head(tokens)[:, 0], truth).backward()
            optimizer.step()
        assert all((p != old).any() for p, old in zip(head.parameters(), before))


def test_the_tokens_are_those_of_four_blocks():
    torch.manual_seed(0)
    vit = build_vit(ARCH, 48).eval()
    found = tokens_of(vit)(images := torch.randn(2, 3, 48, 48))
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    after = []
    for block in vit.blocks:
        x = block(x)
        after.append(x)
    torch.testing.assert_close(found, vit.norm(torch.stack([after[i] for i in (0, 2, 3, 5)], dim=1)))


def test_the_recipe_is_the_linear_heads_at_its_own_rate():
    linear, ours = NYU_LINEAR.recipe("vit_base_patch16", "paper"), NYU_DPT.recipe("vit_base_patch16", "paper")
    assert (ours.lr, ours.channels, ours.weight_decay) == (1e-4, 256, 0.01)
    changed = {name for name, value in vars(ours).items() if getattr(linear, name, None) != value}
    assert changed == {"lr", "channels"}
    assert set(sources(ARCH)) == set(vars(ours))
    # The Toolbox cycles beta1 and cuts gradients as DINOv2's configuration of the linear head does.
    assert (ours.betas, ours.lowest_beta1, ours.max_norm) == ((0.95, 0.999), 0.85, 35)


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    job = job_of(root, tmp_path_factory.mktemp("trained"))
    return job, run_job(job)


def test_a_run_is_scored_and_names_its_blocks(trained):
    job, record = trained
    assert record.status == "ok", record.reason
    assert verify(job.work / RECORD_FILE) == pytest.approx(record.metrics)
    assert record.resolved["feature"] == "tokens after blocks 1, 3, 4, 6, each through the final norm"


def test_a_resumed_run_is_an_undisturbed_one(trained, root, tmp_path, monkeypatch):
    job = job_of(root, tmp_path / "work", Machine(save_minutes=0))
    assert_resumed_is_undisturbed(job, depth, *trained, monkeypatch)


def test_it_learns_the_depths_that_it_is_trained_on(root, tmp_path):
    for split in ("train", "test"):
        lines = (root / FOLDER / "nyu_train.txt").read_text()
        (tmp_path / FOLDER).mkdir(exist_ok=True)
        (tmp_path / FOLDER / f"nyu_{split}.txt").write_text(lines)
    for folder in (path for path in (root / FOLDER).iterdir() if path.is_dir()):
        (tmp_path / FOLDER / folder.name).symlink_to(folder)
    record = run_job(job_of(tmp_path, tmp_path / "work", iterations=120, warmup_iterations=5, lr=1e-3, channels=32))
    truths = [read_depth(file) for _, file in pairs(root / FOLDER, "train")]
    flat = [depth.metrics_of(depth.sums_of(truth * 0 + START, truth)[None])["rmse"].item() for truth in truths]
    assert record.metrics["rmse"] < 0.8 * sum(flat) / len(flat)


@pytest.mark.parametrize(("knobs", "knob"), [({"image_size": 50}, "image_size"), ({}, None)])
def test_a_job_that_is_objected_to_would_fail_and_any_other_runs(root, tmp_path, knobs, knob):
    assert_objection_is_right(job_of(root, tmp_path / "work", **knobs), knob, "50x50 is not divisible" if knob else "")


def test_the_space_is_what_a_training_takes(root, tmp_path):
    assert_space_is_right(job_of(root, tmp_path / "work"), HEAD_FILE)
