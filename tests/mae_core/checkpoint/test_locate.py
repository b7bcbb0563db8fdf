import huggingface_hub
import pytest
import timm
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from mae_core.checkpoint import CheckpointError, read_checkpoint
from tests.fixtures.checkpoint import hf, vit
from tests.mae_core.checkpoint.test_formats import folder

STATE = hf(vit().state_dict())


class Hub:
    """Stands for the hub and its cache: serves a folder, or is out of reach."""

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
        path = folder(
            tmp_path / "snapshot", STATE, {"layer_norm_eps": 1e-5}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        )
        found = Hub(path, **options)
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


def test_offline_without_a_cache_is_said_so(hub):
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
