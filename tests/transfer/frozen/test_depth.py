"""Linear depth of a frozen encoder: its loss, its score, its views and its training."""

import math
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from benchmarks.samples import sample_of
from benchmarks.verify import verify
from mae_core.checkpoint import parameters_sha256
from mae_core.data import Sample
from mae_core.errors import UserError
from mae_core.machine import Machine
from tests.fixtures.miniature import write_few
from tests.fixtures.transfer import (
    ARCH,
    assert_objection_is_right,
    assert_resumed_is_undisturbed,
    assert_space_is_right,
    small_checkpoint,
)
from transfer.data.nyu import FOLDER, pairs, read_depth
from transfer.frozen import depth as linear
from transfer.frozen import encoder as frozen
from transfer.frozen.depth import (
    LinearDepthRecipe,
    PatchDepth,
    beta1_of,
    metrics_of,
    rate_of,
    scale_invariant,
    sums_of,
)
from transfer.frozen.depth_views import DepthViews, recoloured
from transfer.frozen.segment import HEAD_FILE
from transfer.frozen.tasks import NYU_LINEAR
from transfer.miniature import dense
from transfer.miniature import depth as miniature
from transfer.run import run_job
from transfer.task import RECORD_FILE, Job

LITTLE = {"image_size": 48, "stride": 32, "batch": 4, "iterations": 4, "warmup_iterations": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_few(miniature.nyu, tmp_path_factory.mktemp("depth"), 8, 3)


def job_of(root, work, machine=None, seed=0, **knobs) -> Job:
    recipe, data = replace(NYU_LINEAR.recipe(ARCH, "mini"), **LITTLE | knobs), NYU_LINEAR.inspect(root)
    assert data.status == "found", data.detail
    return Job(
        NYU_LINEAR, small_checkpoint(), recipe, "mini", knobs, data, work, seed, machine=machine or Machine(), out=work
    )


def test_the_recipe_is_that_of_its_source():
    r = NYU_LINEAR.recipe("vit_base_patch16", "paper")
    assert (r.image_size, r.batch, r.iterations, r.warmup_iterations, r.bins) == (416, 16, 38_400, 12_800, 256)
    assert (r.lr, r.weight_decay, r.max_norm, r.flip, r.rotate) == (5e-3, 0.01, 35, 0.5, 2.5)
    assert NYU_LINEAR.recipe("vit_large_patch14", "paper").image_size == 406
    # mmcv: half a cosine, and a line from a thousandth over the warm-up.
    rates = [rate_of(r, step, 38_400) / r.lr for step in (0, 6400, 19_200, 38_400)]
    assert rates == pytest.approx([1e-3, (1 + math.cos(math.pi / 6)) / 2 * (0.001 + 0.999 / 2), 0.5, 0], abs=1e-9)


@pytest.mark.parametrize("steps", [4, 100, 38_400])
def test_beta1_goes_through_torchs_one_cycle(steps):
    """OneCycleLR cycles it as mmcv's OneCycle of the momentum: 0.95, 0.85 after 30 % of the steps, 0.95."""
    r, optimizer = NYU_LINEAR.recipe(ARCH, "paper"), torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, steps)
    for step in range(steps):
        if step % max(1, steps // 100) == 0 or step == steps - 1:
            assert beta1_of(r, step, steps) == pytest.approx(optimizer.param_groups[0]["betas"][0], abs=1e-12)
        if step < steps - 1:
            optimizer.step()
            cycle.step()
    assert (r.betas, r.lowest_beta1) == ((0.95, 0.999), 0.85)


def test_the_optimizer_gets_cut_gradients_and_the_steps_beta1(root, tmp_path, monkeypatch):
    given, original = [], torch.optim.AdamW.step

    def step(self, *arguments, **options):
        norm = torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm()
        given.append((norm.item(), self.param_groups[0]["betas"]))
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    job = job_of(root, tmp_path / "work", max_norm=1e-3)
    assert run_job(job).status == "ok"
    norms, betas = zip(*given)
    assert norms == pytest.approx([1e-3] * 4, rel=1e-3)
    assert list(betas) == [(beta1_of(job.recipe, step, 4), 0.999) for step in range(4)]


def test_the_loss_of_hand_cases():
    truth = torch.tensor([[1.0, 2.0], [4.0, 0.0]])  # the last one is unknown
    eps = 1e-3
    # Twice as far everywhere: no variance but for the 1 mm, a mean of log 2.
    predicted = 2 * (truth + eps) - eps
    predicted[1, 1] = 99.0
    assert scale_invariant(predicted, truth).item() == pytest.approx(math.sqrt(0.15) * math.log(2), rel=1e-5)
    # Log ratios 0.3, 0 and -0.3: no mean, a variance of 0.09.
    predicted = (truth + eps) * torch.tensor([[0.3, 0.0], [-0.3, 0.0]]).exp() - eps
    assert scale_invariant(predicted, truth).item() == pytest.approx(0.3, rel=1e-5)


def test_images_without_depth_or_without_error_have_a_slope_all_the_same():
    truth = torch.stack([torch.zeros(3, 3), torch.full((3, 3), 2.0), torch.full((3, 3), 2.0)])
    predicted = torch.full((3, 3, 3), 2.0)
    predicted[2] = 3.0
    predicted.requires_grad_()
    losses = [scale_invariant(metres, depth) for metres, depth in zip(predicted, truth)]
    assert losses[:2] == [0, 0]
    sum(losses).backward()
    assert predicted.grad.isfinite().all()
    assert predicted.grad[2].abs().sum() > 0


class Says(nn.Module):
    """Metres [B, 1, 3, 4] that are the tokens."""

    def forward(self, tokens):
        return tokens


def test_the_loss_takes_the_pixels_of_two_images_together():
    """As SigLoss does with the two of a GPU: images that are too far and too near by the same factor have no mean, and
    all of their error is variance. By NumPy, in float64."""
    rng = np.random.default_rng(0)
    truth, predicted = rng.uniform(1, 9, (6, 3, 4)), rng.uniform(1, 9, (6, 3, 4))
    truth[0, :2], truth[3] = 0, 0  # unknown: half of an image, and a whole one

    def by_hand(*images: int) -> float:
        places = [(i, *place) for i in images for place in zip(*np.nonzero(truth[i]))]
        g = np.array([np.log(predicted[place] + 1e-3) - np.log(truth[place] + 1e-3) for place in places])
        return (g.var(ddof=1) + 0.15 * g.mean() ** 2) ** 0.5

    head, tokens, depth = Says(), *(torch.tensor(x, dtype=torch.float32) for x in (predicted[:, None], truth))
    pairs = [by_hand(0, 1), by_hand(2, 3), by_hand(4, 5)]
    assert linear.loss(head, tokens, depth).item() == pytest.approx(np.mean(pairs), rel=1e-5)
    # The same in parts of two and four. Of three images the last stands alone.
    parts = [linear.loss(head, tokens[part], depth[part]).item() for part in (slice(2), slice(2, 6))]
    assert (2 * parts[0] + 4 * parts[1]) / 6 == pytest.approx(np.mean(pairs), rel=1e-5)
    odd = linear.loss(head, tokens[:3], depth[:3]).item()
    assert odd == pytest.approx((2 * by_hand(0, 1) + by_hand(2)) / 3, rel=1e-5)
    one = torch.full((2, 1, 3, 4), 4.0)
    assert linear.loss(head, one, torch.stack([one[0, 0] / 2, one[1, 0] * 2])).item() > 0.69


def test_an_odd_micro_batch_is_noted(root, tmp_path):
    record = run_job(job_of(root, tmp_path / "work", Machine(micro_batch=1)))
    assert record.notes == ("each image stood alone in its loss",)
    assert run_job(job_of(root, tmp_path / "even", Machine(micro_batch=2))).notes == ()


def test_micro_batches_of_two_make_the_same_head(root, tmp_path, trained):
    job, _ = trained
    parted = job_of(root, tmp_path / "work", Machine(micro_batch=2))
    assert run_job(parted).status == "ok"
    whole, parts = (load_file(one.work / HEAD_FILE) for one in (job, parted))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_head_computes_in_float32_under_autocast():
    torch.manual_seed(0)
    head, tokens = PatchDepth(8, 16), torch.randn(2, 1, 1 + 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(tokens)
    assert found.dtype == torch.float32
    assert torch.equal(found, head(tokens))
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize(("said", "cut"), [(25.0, 10.0), (-3.0, 1e-3), (4.0, 4.0)])
def test_depths_are_cut_to_what_there_is(said, cut, root, tmp_path, monkeypatch):
    original = PatchDepth.forward
    monkeypatch.setattr(
        PatchDepth, "forward", lambda self, x: original(self, x) if self.training else original(self, x) * 0 + said
    )
    record = run_job(job_of(root, tmp_path / "work"))
    truths = [read_depth(file) for _, file in pairs(root / FOLDER, "val")]
    expected = metrics_of(np.stack([sums_of(np.full_like(truth, cut), truth) for truth in truths]))
    assert record.metrics == pytest.approx({name: values.mean() for name, values in expected.items()}, rel=1e-4)


def test_the_score_of_a_hand_case():
    truth = np.array([[1.0, 2.0, 4.0], [0.0, 10.0, 8.0]], np.float32)  # 0 and 10 do not count
    metres = np.array([[1.2, 2.0, 3.0], [5.0, 5.0, 8.0]], np.float32)
    found = metrics_of(sums_of(metres, truth)[None])
    assert found["delta1"].item() == pytest.approx(75)  # 3 for 4 m is a factor of 1.33
    assert found["rmse"].item() == pytest.approx(math.sqrt((0.2**2 + 1) / 4))
    assert found["abs_rel"].item() == pytest.approx((0.2 + 0.25) / 4)


def test_of_nyus_own_size_eigens_crop_counts():
    truth = np.ones((480, 640), np.float32)
    metres = np.full((480, 640), 2.0, np.float32)
    metres[45:471, 41:601] = 1.0
    assert sums_of(metres, truth).tolist() == [426 * 560, 426 * 560, 0, 0]


def test_the_head_is_dinov2s():
    """Which interpolates the features and then applies the layer: the same."""
    torch.manual_seed(0)
    head, tokens = PatchDepth(8, 16), torch.randn(2, 1, 1 + 9, 8)
    patches = tokens[:, 0, 1:].mT.reshape(2, 8, 3, 3)
    both = torch.cat([patches, tokens[:, 0, 0, :, None, None].expand(2, 8, 3, 3)], dim=1)
    logits = F.relu(head.layer(F.interpolate(both, scale_factor=4, mode="bilinear"))) + 0.1
    bins = torch.linspace(1e-3, 10, 16)
    expected = (logits / logits.sum(dim=1, keepdim=True) * bins[:, None, None]).sum(dim=1)
    assert torch.allclose(head(tokens)[:, 0], expected, atol=1e-5)


def test_views_depend_on_seed_and_position_alone_and_stay_aligned(root, tmp_path):
    r = replace(job_of(root, root).recipe, rotate=2.5, colour=True)
    files = pairs(root / FOLDER, "train")
    views = DepthViews(files, r, seed=0)
    image, target, bad = views[Sample(3, 7)]
    assert (image.shape, image.dtype, target["label"].shape, bad) == ((3, 48, 48), torch.uint8, (48, 48), "")
    again = views[Sample(3, 7)]
    assert torch.equal(image, again[0])
    assert torch.equal(target["label"], again[1]["label"])
    assert not torch.equal(image, views[Sample(3, 8)][0])
    assert not torch.equal(image, DepthViews(files, r, seed=1)[Sample(3, 7)][0])
    # An image that is its own depth: what happens to one must happen to the other.
    steps = np.repeat(1 + np.arange(480)[:, None] // 48, 640, axis=1).astype(np.uint16)
    Image.fromarray((10 * steps).astype(np.uint8)).save(tmp_path / "rgb.png")
    Image.fromarray(10 * steps).save(tmp_path / "depth.png")
    views = DepthViews([(tmp_path / "rgb.png", tmp_path / "depth.png")], replace(r, image_size=400, colour=False), 0)
    turned = 0
    for position in range(8):
        image, target, _ = views[Sample(0, position)]
        gap = (image[0] - 1000 * target["label"]).abs()
        assert gap.median() == 0
        assert (gap > 0).float().mean() < 0.1  # along the edges, which are sharp in the depth
        turned += bool((target["label"] != target["label"][:, :1]).any())
    assert 0 < turned < 8


def test_colours_change_in_half_of_the_views():
    torch.manual_seed(0)
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    made = [recoloured(grey) for _ in range(200)]
    same = sum(torch.equal(one, grey) for one in made)
    assert 70 < same < 130
    values = torch.stack(made).float()
    assert values.min() >= 255 * (100 / 255) ** 1.1 * 0.75 * 0.9 - 1
    assert values.max() <= 255 * (100 / 255) ** 0.9 * 1.25 * 1.1 + 1


def test_the_miniatures_depths_tell_the_classes_apart(root):
    scene = dense.picture(0, "train", 0)
    metres = miniature.depth_of(scene)
    first = len(scene.scene.regions)
    for number, thing in enumerate(scene.scene.objects, first):
        found = np.unique(metres[scene.owner == number])
        assert found.tolist() == ([miniature.METRES[thing.kind]] if thing.kind in miniature.METRES else [0.0])
    assert len(set(miniature.METRES.values())) == len(miniature.METRES)
    assert np.abs(read_depth(pairs(root / FOLDER, "train")[0][1]) - metres).max() <= 5.1e-4


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    job = job_of(root, tmp_path_factory.mktemp("trained"))
    return job, run_job(job)


def test_a_run_keeps_what_its_numbers_are_made_of(trained, root):
    job, record = trained
    assert record.status == "ok", record.reason
    assert verify(job.work / RECORD_FILE) == pytest.approx(record.metrics)
    assert 0 <= record.metrics["delta1"] <= 100
    sample, right_or_wrong = sample_of(record, job.work, root)
    assert not right_or_wrong
    assert sample.values(np.ones((1, sample.images))).item() == pytest.approx(record.metrics["delta1"])
    assert record.resolved["backbone_sha256"] == parameters_sha256(
        frozen.Tokens(frozen.frozen_encoder(job)[0], norm=True).state_dict().items()
    )


def test_a_resumed_run_is_an_undisturbed_one(trained, root, tmp_path, monkeypatch):
    job = job_of(root, tmp_path / "work", Machine(save_minutes=0))
    assert_resumed_is_undisturbed(job, linear, *trained, monkeypatch)


def test_it_learns_the_depths_that_it_is_trained_on(root, tmp_path):
    """Nearer than what the untrained head says, 5 m everywhere: tested on its training images, since eight teach little
    about others."""
    data = shutil.copytree(root, tmp_path / "copy")
    shutil.copy(data / FOLDER / "nyu_train.txt", data / FOLDER / "nyu_test.txt")
    record = run_job(job_of(data, tmp_path / "work", iterations=120, warmup_iterations=5, lr=2e-2))
    truths = [read_depth(file) for _, file in pairs(data / FOLDER, "val")]
    flat = metrics_of(np.stack([sums_of(np.full_like(truth, 5.0), truth) for truth in truths]))
    assert record.metrics["rmse"] < 0.8 * flat["rmse"].mean()


@pytest.mark.parametrize(
    ("knobs", "knob", "said"),
    [
        ({"image_size": 50}, "image_size", "50x50 is not divisible"),
        ({"batch": 9}, "batch", "8 training images are less than one batch=9"),
        ({"batch": 8}, None, ""),
    ],
)
def test_a_job_that_is_objected_to_would_fail_and_any_other_runs(root, tmp_path, knobs, knob, said):
    assert_objection_is_right(job_of(root, tmp_path / "work", **knobs), knob, said)


def test_wrong_recipes_and_unmeasured_images_are_refused(root, tmp_path):
    for wrong in ({"stride": 99}, {"warmup_iterations": 4}, {"bins": 1}):
        with pytest.raises(UserError):
            job_of(root, tmp_path, **wrong)
    data = shutil.copytree(root, tmp_path / "copy")
    (_, first), *_ = pairs(data / FOLDER, "val")
    Image.fromarray(np.full_like(np.asarray(Image.open(first)), 20_000)).save(first)  # 20 m: beyond what counts
    record = run_job(job_of(data, tmp_path / "work"))
    assert record.status == "failed"
    assert "has no measured depth between 1 mm and 10 m" in record.reason


def test_the_space_is_what_a_training_takes(root, tmp_path):
    assert_space_is_right(job_of(root, tmp_path / "work"), HEAD_FILE)


def test_the_source_of_every_knob_is_named():
    assert set(NYU_LINEAR.sources(ARCH)) == {field.name for field in fields(LinearDepthRecipe)}
    assert isinstance(PatchDepth(4, 2).layer, nn.Conv2d)
