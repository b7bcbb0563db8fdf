"""Where a checkpoint lies: a file, a folder with a config, hf:NAME or timm:NAME; and what the config says about it."""

import difflib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mae_core.checkpoint.errors import CheckpointError
from mae_core.data import MEAN, STD

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
CONFIGS = ("config.json", "preprocessor_config.json")
SHARDED = (
    "is a sharded checkpoint of torch.distributed.checkpoint: make one file of it with `python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUT.pth` (dcp_to_torch_save) and give that"
)
OFFLINE = "it is not in the local cache and could not be fetched"


@dataclass(frozen=True)
class Source:
    """spec: what was asked for. path: the weight file. name: for people. settings: those of mean, std, eps, heads and
    architecture (timm's name) that the configs beside the weights give. config: SHA-256 of those configs, "" without
    any: they affect numbers too."""

    spec: str
    path: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    config: str = ""


def locate(spec: str) -> Source:
    """The weight file that a path, "hf:NAME[@REVISION]" or "timm:NAME" means; CheckpointError if there is none."""
    if spec.startswith("timm:"):
        return _in_folder(_fetched(spec, _timm_repository(spec)), spec)
    if spec.startswith("hf:"):
        return _in_folder(_fetched(spec, spec.removeprefix("hf:")), spec)
    try:
        return _local(Path(spec).expanduser())
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a home or a link that leads nowhere
        raise CheckpointError(f"{spec} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _local(path: Path) -> Source:
    if path.is_dir():
        return _in_folder(path, path.resolve().name, str(path))
    if path.suffix == ".distcp" and path.exists():
        raise CheckpointError(f"{path.parent} {SHARDED}")
    # Only under these names does a file belong to the config beside it.
    settings, config = _read_configs(path.parent) if path.name in WEIGHTS else ({}, "")
    stem = path.name.removesuffix(".pth.tar") if path.name.endswith(".pth.tar") else path.stem
    return Source(str(path), path, path.resolve().parent.name if config else stem, settings, config)


def _in_folder(folder: Path, name: str, spec: str = "") -> Source:
    found = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if found is None:
        if any(folder.glob("*.distcp")):
            raise CheckpointError(f"{folder} {SHARDED}")
        split = sorted(folder.glob("*.index.json"))
        if split:
            raise CheckpointError(
                f"{folder} holds weights in several files ({split[0].name}): save them as one (save_pretrained with "
                "max_shard_size='20GB')"
            )
        files = sorted(file.name for file in folder.iterdir() if file.is_file())
        there = f"it holds {', '.join(files[:4])}{' ...' if len(files) > 4 else ''}" if files else "it holds no file"
        raise CheckpointError(f"{folder} is a folder without {' or '.join(WEIGHTS)} ({there}): give the weight file")
    return Source(spec or name, found, name, *_read_configs(folder))


def _read_configs(folder: Path) -> tuple[dict[str, Any], str]:
    """The settings in config.json (Hugging Face's or timm's) and preprocessor_config.json, and the digest of both."""
    digest, found = hashlib.sha256(), dict[str, Any]()
    present = [folder / name for name in CONFIGS if (folder / name).is_file()]
    for path in present:
        try:
            content = path.read_bytes()
            config = json.loads(content)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is no JSON file ({error}): restore it or move it away") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} holds no settings: restore it or move it away")
        digest.update(content)
        if config.get("model_type") == "vit_mae":  # same names as a plain ViT's, which has another normalization
            found |= {"mean": MEAN, "std": STD}
        timms = config.get("pretrained_cfg")
        timms = timms if isinstance(timms, dict) else {}
        given = {
            "mean": config.get("image_mean") or timms.get("mean"),
            "std": config.get("image_std") or timms.get("std"),
            "eps": config.get("layer_norm_eps"),
            "heads": config.get("num_attention_heads"),
            "architecture": config.get("architecture"),
        }
        found |= {name: value for name, value in given.items() if value}
    try:
        for name in {"mean", "std"} & found.keys():
            found[name] = tuple(float(v) for v in found[name])
            if len(found[name]) != 3:
                raise ValueError("mean and std need three channels")
        found |= {name: float(found[name]) for name in {"eps"} & found.keys()}
        if not isinstance(found.get("architecture", ""), str):
            raise ValueError(f"architecture is {found['architecture']}")
        if not isinstance(found.get("heads", 1), int):
            raise ValueError(f"num_attention_heads is {found['heads']}")
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{folder}: config.json or preprocessor_config.json is damaged ({error})") from None
    return found, digest.hexdigest() if present else ""


def _timm_repository(spec: str) -> str:
    """The hub repository of timm's pretrained weights of that name."""
    import timm

    name = spec.removeprefix("timm:")
    try:
        config = timm.get_pretrained_cfg(name)
    except (RuntimeError, ValueError):
        config = None
    if config is None:
        known = timm.list_pretrained("*vit*") + timm.list_pretrained("*beit*") + timm.list_pretrained("deit*")
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = (
            f"the nearest are {', '.join(near)}" if near else f"it has {', '.join(known[:3])} and {len(known)} in all"
        )
        raise CheckpointError(f"{spec}: timm has no weights of that name; {hint}")
    if not config.hf_hub_id:
        raise CheckpointError(f"{spec}: timm does not keep these weights on the Hugging Face hub; download the file")
    return config.hf_hub_id


def _fetched(spec: str, repository: str) -> Path:
    """The folder of a hub repository's weights and configs ("NAME" or "NAME@REVISION"), in the local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, at = repository.partition("@")
    revision = at or None

    def get(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, file, revision=revision))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    try:
        for file in CONFIGS:
            get(file)
        found = [path for file in WEIGHTS if (path := get(file))]
    except LocalEntryNotFoundError:
        found = _cached(repository, revision)
        if not found:
            raise CheckpointError(
                f"{spec}: {OFFLINE}; download {WEIGHTS[0]} and {CONFIGS[0]} of {repository} where there is a network "
                "and give their folder"
            ) from None
    except HFValidationError as error:
        raise CheckpointError(f"{spec}: {error}") from None
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(f"{spec}: could not be fetched ({reason}): check the name, or download it") from None
    if not found:
        raise CheckpointError(f"{spec} holds neither {' nor '.join(WEIGHTS)}: download its weight file and give that")
    return found[0].parent


def _cached(repository: str, revision: str | None) -> list[Path]:
    """The weight file in the local cache, if it is there; some of its neighbours may be absent."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, file, revision=revision) for file in WEIGHTS)
    return [Path(path) for path in found if isinstance(path, str)]
