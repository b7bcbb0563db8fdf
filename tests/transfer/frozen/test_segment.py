"""Linear segmentation of a frozen encoder: its views, its windows, its score and its training."""

import colorsys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix
from torch import nn
from torch.nn import functional as F

from benchmarks.verify import verify
from mae_core.checkpoint import parameters_sha256
from mae_core.data import IMAGENET_NORMALIZATION, Sample, normalize
from mae_core.errors import UserError
from mae_core.machine import Machine
from tests.fixtures.miniature import write_few
from tests.fixtures.transfer import (
    ARCH,
    OTHERS,
    assert_objection_is_right,
    assert_same_weights,
    assert_space_is_right,
    other_checkpoint,
    small_checkpoint,
)
from transfer.data.miou import metrics_of
from transfer.frozen import encoder as frozen
from transfer.frozen.scenes import ADE20K, VOC, VOID, Views, areas_of, crop, distorted, whole_image
from transfer.frozen.segment import HEAD_FILE, PatchSegmenter, SegLinearRecipe, loss, rate_of, sliding
from transfer.frozen.tasks import ADE20K_LINEAR, VOC_LINEAR
from transfer.miniature import dense
from transfer.run import run_job
from transfer.task import RECORD_FILE, Job

LITTLE = {"image_size": 48, "stride": 32, "batch": 4, "iterations": 4, "warmup_iterations": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_few(dense.voc, folder, 8, 3)
    return write_few(dense.ade20k, folder, 8, 3)


def job_of(task, root, work, machine=None, seed=0, checkpoint=None, **knobs) -> Job:
    recipe, data = replace(task.recipe(ARCH, "mini"), **LITTLE | knobs), task.inspect(root)
    assert data.status == "found", data.detail
    checkpoint = checkpoint or small_checkpoint()
    return Job(task, checkpoint, recipe, "mini", knobs, data, work, seed, machine=machine or Machine(), out=work)


def test_the_recipe_is_dinov3s():
    r = ADE20K_LINEAR.recipe("vit_base_patch16", "paper")
    assert (r.image_size, r.stride, r.batch, r.iterations, r.warmup_iterations) == (512, 341, 16, 40_000, 1500)
    assert (r.lr, r.weight_decay, r.betas, r.dropout) == (1e-3, 1e-3, (0.9, 0.999), 0.1)
    assert (r.min_scale, r.max_scale, r.max_class_share, r.flip) == (0.5, 2.0, 0.75, 0.5)
    assert ADE20K_LINEAR.recipe("vit_large_patch14", "paper").image_size == 504
    rates = [rate_of(r, step, 40_000) for step in (0, 750, 20_000, 39_999)]
    assert rates == pytest.approx([0, 5e-4 * (1 - 750 / 40_000), 5e-4, 0], rel=1e-3, abs=1e-12)


def test_the_score_is_that_of_scikit_learns_confusion_matrix():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 6, (3, 20, 30)).astype(np.uint8)  # class 6 occurs nowhere
    predicted = np.where(rng.random(label.shape) < 0.6, label, rng.integers(0, 6, label.shape))
    label[rng.random(label.shape) < 0.1] = VOID
    areas = np.stack([areas_of(p, t, 7) for p, t in zip(predicted, label)])
    matrix = confusion_matrix(label[label != VOID], predicted[label != VOID], labels=range(6))
    both = np.diag(matrix)
    iou = both / (matrix.sum(axis=0) + matrix.sum(axis=1) - both)
    found = metrics_of(areas.sum(axis=0))
    assert found["miou"] == pytest.approx(100 * iou.mean())
    assert found["macc"] == pytest.approx(100 * (both / matrix.sum(axis=1)).mean())
    assert found["aacc"] == pytest.approx(100 * both.sum() / matrix.sum())


def test_ade20ks_zero_and_vocs_255_have_no_class(root):
    for scenes, first in ((ADE20K, 1), (VOC, 0)):
        files = [file for _, file in scenes.pairs(root / scenes.folder, "train")]
        ids = np.concatenate([np.asarray(Image.open(file)).astype(int).ravel() for file in files])
        label = np.concatenate([scenes.label(file).ravel() for file in files])
        without = ids == (0 if first else 255)
        assert without.any()
        np.testing.assert_array_equal(label == VOID, without)
        np.testing.assert_array_equal(label[~without], ids[~without] - first)


def test_views_depend_on_seed_and_position_alone_and_stay_aligned(root):
    r = job_of(ADE20K_LINEAR, root, root).recipe
    pairs = ADE20K.pairs(root / ADE20K.folder, "train")
    views = Views(pairs, ADE20K, r, seed=0)
    image, target, bad = views[Sample(3, 7)]
    assert (image.shape, target["label"].shape, bad) == ((3, 48, 48), (48, 48), "")
    again = views[Sample(3, 7)]
    assert torch.equal(image, again[0])
    assert torch.equal(target["label"], again[1]["label"])
    assert not torch.equal(image, views[Sample(3, 8)][0])
    assert not torch.equal(image, Views(pairs, ADE20K, r, seed=1)[Sample(3, 7)][0])

    class Mirror:  # an image that is its own label: what happens to one must happen to the other
        label = staticmethod(lambda file: np.array(Image.open(file)))

    file = root / "mirror.png"
    Image.fromarray((np.arange(60 * 40).reshape(40, 60) // 240 * 20).astype(np.uint8)).save(file)
    image, target, _ = Views([(file, file)], Mirror(), replace(r, min_scale=1.0, max_scale=1.0), seed=0)[Sample(0, 5)]
    shown = target["label"] != VOID
    assert (image[0][shown].float() - target["label"][shown]).abs().median() <= 1


def test_a_crop_that_one_class_fills_is_drawn_again():
    """9 of 49 places have 25 to 75 % of the second class: of ten draws one is there in 87 %."""
    label, image = torch.zeros(1, 16, 64, dtype=torch.uint8), torch.zeros(3, 16, 64, dtype=torch.uint8)
    label[:, :, 44:] = 1
    torch.manual_seed(0)
    shares = np.array([crop(image, label, 16, 0.76)[1].float().mean().item() for _ in range(200)])
    assert 0.75 < ((shares >= 0.25) & (shares <= 0.75)).mean() < 0.95
    label[:] = 0
    assert crop(image, label, 16, 0.76)[1].shape == (1, 16, 16)


def test_windows_are_averaged_where_they_overlap():
    """The model says of each pixel its own value, and of all pixels the window's mean: which is then averaged."""

    class Says(nn.Module):
        def forward(self, images):
            return torch.cat([images[:, :1], images[:, :1].mean(dim=(2, 3), keepdim=True).expand_as(images[:, :1])], 1)

    image = torch.randint(0, 256, (3, 48, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = sliding(Says(), image, 48, 16, IMAGENET_NORMALIZATION, Machine())
    values = normalize(image[None])[0, 0]
    torch.testing.assert_close(found[0], values)
    means = [values[:, left : left + 48].mean() for left in (0, 16, 22)]
    torch.testing.assert_close(found[1, 0, 0], means[0])
    torch.testing.assert_close(found[1, 0, 20], (means[0] + means[1]) / 2)
    torch.testing.assert_close(found[1, 0, 30], sum(means) / 3)
    torch.testing.assert_close(found[1, 0, 69], means[2])


def draws(image, count=1000):
    torch.manual_seed(0)
    return torch.stack([distorted(image) for _ in range(count)]).int()


def test_brightness_is_added_and_then_contrast_scales_about_zero():
    """A black image becomes at most 32, times 1.5; one of 250 at least half of 250 - 32. Of a grey one a quarter stays
    as it is, since hue and saturation leave it."""
    black, bright, grey = (draws(torch.full((3, 2, 2), value, dtype=torch.uint8)) for value in (0, 250, 100))
    assert 40 < black.max() <= 48
    assert 109 <= bright.min() < 122
    assert (grey == grey[:, :1, :1, :1]).all()
    assert 0.2 < (grey == 100).all(dim=(1, 2, 3)).float().mean() < 0.3
    assert 180 < grey.max() <= 198
    assert 34 <= grey.min() < 45


def test_channels_are_distorted_alike_and_never_change_places(monkeypatch):
    """Without hue and saturation all channels get one sum and one factor. How these two are called: each in half the
    cases; a factor comes before the hue in a quarter of its cases, after it in another quarter."""
    saturations, hues, given, last = [], [], [], []
    image = torch.tensor([120, 80, 40], dtype=torch.uint8).view(3, 1, 1)
    functional = "torchvision.transforms.functional"
    monkeypatch.setattr(f"{functional}.adjust_saturation", lambda x, factor: (saturations.append(factor), x)[1])
    monkeypatch.setattr(f"{functional}.adjust_hue", lambda x, by: (hues.append(by), given.append(x.int()), x)[2])
    torch.manual_seed(0)
    for _ in range(1000):
        before = len(hues)
        made = distorted(image).int()
        last += [made] * (len(hues) - before)
        factor = (made[0] - made[2]).item() / 80
        assert 0.48 <= factor <= 1.52
        assert abs(2 * made[1] - made[0] - made[2]).item() <= 2  # each was rounded down
        assert abs(made[0].item() / factor - 120) <= 32 + 4 / factor  # 1 / 80 of 120, and what was rounded
    for found, low, high in ((saturations, 0.5, 1.5), (hues, -0.5, 0.5)):
        assert 440 < len(found) < 560
        assert low <= min(found) < low + 0.05
        assert high - 0.05 < max(found) <= high
    scaled = [abs((x[0] - x[2]).item() - 80) > 1 for x in given]
    changed = [not torch.equal(x, y) for x, y in zip(given, last)]
    assert all(0.2 < np.mean(found) < 0.3 for found in (scaled, changed))
    assert not (np.array(scaled) & np.array(changed)).any()


def test_the_hue_turns_by_up_to_half_a_circle():
    """Red becomes every colour of the wheel, which brightness, contrast and saturation cannot make of it."""
    red = torch.tensor([200, 40, 40], dtype=torch.uint8).view(3, 1, 1)
    hues = [colorsys.rgb_to_hsv(*(made.flatten() / 255).tolist())[0] for made in draws(red)]
    counts = np.histogram(hues, bins=12, range=(0, 1))[0]
    assert counts[1:11].min() > 20


def test_the_loss_is_torchs_over_all_pixels_and_the_same_in_parts():
    head = PatchSegmenter(8, 3, dropout=0.0).eval()
    tokens = torch.randn(2, 1, 17, 8)
    label = torch.randint(0, 3, (2, 16, 16))
    label[0, :4] = VOID
    maps = tokens[:, 0, 1:].transpose(1, 2).reshape(2, 8, 4, 4)
    logits = F.interpolate(head.layer(head.norm(maps)), (16, 16), mode="bilinear")
    each = F.cross_entropy(logits, label, ignore_index=VOID, reduction="none")
    assert (each[0, :4] == 0).all()
    torch.testing.assert_close(loss(head, tokens, label), each.mean())
    parts = [loss(head, tokens[i : i + 1], label[i : i + 1]) for i in range(2)]  # of which one has fewer labels
    torch.testing.assert_close(sum(parts) / 2, loss(head, tokens, label))
    assert loss(head, tokens, torch.full_like(label, VOID)) == 0


def test_the_head_computes_in_float32_under_autocast():
    torch.manual_seed(0)
    head, tokens = PatchSegmenter(8, 3, dropout=0.0).eval(), torch.randn(2, 1, 17, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(tokens)
    assert found.dtype == torch.float32
    assert torch.equal(found, head(tokens))
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("task", [ADE20K_LINEAR, VOC_LINEAR], ids=lambda task: task.name)
def test_a_run_scores_every_image_and_can_be_verified(task, root, tmp_path):
    job = job_of(task, root, tmp_path / "work")
    record = run_job(job)
    assert record.status == "ok", record.reason
    assert (record.n_eval, record.images_seen, record.resolved["iterations"]) == (3, 16, 4)
    assert record.metrics.keys() == {"miou", "macc", "aacc"}
    assert verify(job.work / RECORD_FILE) == pytest.approx(record.metrics)


@pytest.mark.parametrize("name", OTHERS)
def test_other_encoders_are_segmented_too(name, root, tmp_path):
    record = run_job(job_of(ADE20K_LINEAR, root, tmp_path / "w", checkpoint=other_checkpoint(OTHERS[name])))
    assert record.status == "ok", record.reason


def test_a_killed_training_goes_on_to_the_same_weights(root, tmp_path, monkeypatch):
    whole, killed = (job_of(ADE20K_LINEAR, root, tmp_path / name, Machine(save_minutes=0)) for name in ("a", "b"))
    assert run_job(whole).status == "ok"
    forward, calls = frozen.forward, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(frozen, "forward", fails)
        with pytest.raises(KeyboardInterrupt):
            run_job(killed)
    assert run_job(killed).status == "ok"
    assert_same_weights(whole.work / HEAD_FILE, killed.work / HEAD_FILE)


KNOBS = {
    "image_size": 56, "iterations": 6, "warmup_iterations": 0, "batch": 8, "lr": 1e-3, "betas": (0.5, 0.9),
    "weight_decay": 0.5, "dropout": 0.5, "min_scale": 1.2, "max_scale": 2.0, "max_class_share": 0.2, "flip": 1.0,
    "photometric": True,
}  # fmt: skip


@pytest.mark.slow
def test_every_knob_moves_the_head_and_the_stride_the_score(root, tmp_path):
    assert {*KNOBS, "stride"} == {field.name for field in fields(SegLinearRecipe)}

    def run(name: str, seed: int = 0, **knobs) -> tuple[str, float]:
        job = job_of(ADE20K_LINEAR, root, tmp_path / name, seed=seed, **knobs)
        record = run_job(job)
        assert record.status == "ok", record.reason
        return parameters_sha256(sorted(load_file(job.work / HEAD_FILE).items())), record.metrics["aacc"]

    first = run("first")
    assert run("again") == first
    moved = {knob: run(knob, **{knob: value})[0] for knob, value in KNOBS.items()}
    assert first[0] not in {*moved.values(), run("seed", seed=1)[0]}
    enough = {"iterations": 24, "lr": 0.05}  # for a head that names some pixels right
    (weights, score), (others, other) = run("longer", **enough), run("stride", stride=7, **enough)
    assert weights == others
    assert 0 < score != other


@pytest.mark.parametrize(
    ("knobs", "knob", "said"),
    [
        ({"image_size": 50}, "image_size", "50x50 is not divisible"),
        ({"batch": 9}, "batch", "8 training images are less than one batch=9"),
        ({"batch": 8}, None, ""),
    ],
)
def test_a_job_that_is_objected_to_would_fail_and_any_other_runs(root, tmp_path, knobs, knob, said):
    assert_objection_is_right(job_of(ADE20K_LINEAR, root, tmp_path, **knobs), knob, said)


def test_wrong_recipes_and_unreadable_images_are_refused(root, tmp_path):
    for wrong in ({"min_scale": 3.0}, {"stride": 99}, {"warmup_iterations": 4}):
        with pytest.raises(UserError):
            job_of(ADE20K_LINEAR, root, tmp_path, **wrong)
    file = tmp_path / "a.jpg"
    file.write_bytes(b"\xff\xd8 cut short")
    with pytest.raises(UserError, match=r"a\.jpg cannot be read as an image"):
        whole_image(file, 48)


def test_the_space_is_what_a_training_takes(root, tmp_path):
    assert_space_is_right(job_of(ADE20K_LINEAR, root, tmp_path / "work"), HEAD_FILE)
