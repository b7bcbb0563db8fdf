import huggingface_hub
import pytest
import timm
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from mae_core.checkpoint import CheckpointError, read_checkpoint
from mae_core.data import MEAN, STD
from tests.fixtures.checkpoint import PLAIN_VIT, assert_same_output, folder, hf, loaded, vit

STATE = hf(PLAIN_VIT)


class Hub:
    """A stand-in for the hub and its cache: serves a folder, or is out of reach."""

    def __init__(self, path, online=True, cached=()):
        self.path, self.online, self.cached, self.asked = path, online, cached, []

    def download(self, repository, file, revision=None):
        self.asked.append((repository, revision))
        if not self.online:
            raise LocalEntryNotFoundError("no connection")
        if not (self.path / file).exists():
            raise EntryNotFoundError("404")
        return str(self.path / file)

    def from_cache(self, repository, file, revision=None):
        return str(self.path / file) if file in self.cached else None


@pytest.fixture
def hub(monkeypatch, tmp_path):
    def make(**options):
        pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        found = Hub(folder(tmp_path / "snapshot", STATE, {"layer_norm_eps": 1e-5}, pixels), **options)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", found.download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found.from_cache)
        return found

    return make


def test_a_model_of_the_hub_is_fetched_with_its_configs(hub):
    found = hub()
    checkpoint = read_checkpoint("hf:someone/vit@v2")
    assert (checkpoint.name, checkpoint.path) == ("hf:someone/vit@v2", "hf:someone/vit@v2")  # a child asks again by it
    assert (checkpoint.eps, checkpoint.mean) == (1e-5, (0.5, 0.5, 0.5))
    assert set(found.asked) == {("someone/vit", "v2")}


def test_offline_the_cache_is_enough(hub):
    hub(online=False, cached=("model.safetensors",))
    assert read_checkpoint("hf:someone/vit").eps == 1e-5


def test_offline_without_a_cache_is_an_error(hub):
    hub(online=False)
    with pytest.raises(CheckpointError, match=r"hf:someone/vit: it is not in the local cache and could not be fetched"):
        read_checkpoint("hf:someone/vit")


def test_a_repository_without_weights_is_refused(hub):
    found = hub()
    (found.path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor pytorch_model.bin"):
        read_checkpoint("hf:someone/vit")


def test_a_malformed_name_is_refused():
    """By huggingface_hub itself, before it asks anyone."""
    with pytest.raises(CheckpointError, match="hf:a/b/c: Repo id must be"):
        read_checkpoint("hf:a/b/c")


def test_timm_names_lead_to_timms_repositories(hub):
    found = hub()
    assert read_checkpoint("timm:vit_base_patch16_224.mae").name == "timm:vit_base_patch16_224.mae"
    config = timm.get_pretrained_cfg("vit_base_patch16_224.mae")
    assert {name for name, _ in found.asked} == {config.hf_hub_id} == {"timm/vit_base_patch16_224.mae"}
    with pytest.raises(CheckpointError, match=r"no weights of that name; the nearest are vit_base_patch16_224.mae,"):
        read_checkpoint("timm:vit_base_patch16_224.mea")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folders_config_sets_pixels_eps_and_heads(tmp_path, name):
    config = {"model_type": "vit", "layer_norm_eps": 1e-3, "num_attention_heads": 4}
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    path = folder(tmp_path / "my-vit", hf(PLAIN_VIT), config, pixels, name)
    whole, inside = read_checkpoint(path), read_checkpoint(path / name)
    assert whole.normalization == inside.normalization == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (whole.eps, whole.name, inside.name, whole.path) == (1e-3, "my-vit", "my-vit", str(path))
    assert_same_output(loaded(whole)[0].forward_features, vit(1e-3).forward_features)
    with pytest.raises(AssertionError):  # the eps shows
        assert_same_output(loaded(whole)[0].forward_features, vit(1e-12).forward_features)
    assert whole.sha256 == inside.sha256
    folder(path, hf(PLAIN_VIT), config, {**pixels, "image_mean": [0.0, 0.2, 0.3]}, name)
    other = read_checkpoint(path)
    assert other.sha256 == whole.sha256
    assert other.identity != whole.identity  # other pixels are another experiment


def test_timms_config_sets_the_normalization(tmp_path):
    config = {"architecture": "vit_mini", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}}
    assert read_checkpoint(folder(tmp_path / "t", PLAIN_VIT, config)).normalization == ((0.5,) * 3, (0.5,) * 3)


def test_vit_mae_without_its_decoder_is_known_by_its_config(tmp_path):
    checkpoint = read_checkpoint(folder(tmp_path / "m", hf(PLAIN_VIT), {"model_type": "vit_mae"}))
    assert (checkpoint.format, checkpoint.normalization) == ("hf-vit", (MEAN, STD))


def test_folders_without_usable_weights_are_refused(tmp_path):
    for files, message in (
        ((), "it holds no file"),
        (("a.pth", "b.txt"), r"without model.safetensors or pytorch_model.bin \(it holds a.pth, b.txt\)"),
        (("model.safetensors.index.json",), "weights in several files"),
    ):
        path = tmp_path / f"folder{len(files)}{''.join(files)[:5]}"
        path.mkdir()
        for name in files:
            (path / name).write_text("{}")
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)
    damaged = folder(tmp_path / "d", hf(PLAIN_VIT))
    contents = {"{": "is no JSON file", "[]": "holds no settings", '{"image_mean": 1}': "is damaged"}
    for content, message in contents.items():
        (damaged / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(damaged)
