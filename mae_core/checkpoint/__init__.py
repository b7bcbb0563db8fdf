"""Any published ViT checkpoint -> Checkpoint: its encoder in timm's names, and strict loading into a ViT.

    python -m mae_core.checkpoint FILE      what a file holds; --formats lists what is read

This is all that other packages use. From a file to a Checkpoint: locate (which file), weights_file (its tensors),
formats and renaming (what is read, as tables), convert (to timm's names), identify (the size, from the tensor shapes,
never from a name), read. From a Checkpoint: load (into a model), export (other projects' forms).
"""

from mae_core.checkpoint.errors import CheckpointError, printable
from mae_core.checkpoint.export import metadata_of
from mae_core.checkpoint.identify import check_shapes
from mae_core.checkpoint.load import LoadReport, classifier_of, load_classifier, load_encoder, model_of
from mae_core.checkpoint.read import Checkpoint, Drawn, numbers_of, read_checkpoint
from mae_core.checkpoint.weights_file import (
    parameters_sha256,
    read_file,
    read_state,
    save_pickle,
    save_tensors,
    save_weights,
    sha256_of,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Drawn",
    "LoadReport",
    "check_shapes",
    "classifier_of",
    "load_classifier",
    "load_encoder",
    "metadata_of",
    "model_of",
    "numbers_of",
    "parameters_sha256",
    "printable",
    "read_checkpoint",
    "read_file",
    "read_state",
    "save_pickle",
    "save_tensors",
    "save_weights",
    "sha256_of",
]
