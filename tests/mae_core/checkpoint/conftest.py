import numpy as np
import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def put(tmp_path):
    """Write a value as the kind of file that its name says; its path."""

    def write(content, name="file.pth", **options):
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file(content, path, **options)
        elif name.endswith(".npz"):
            np.savez(path, **content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path, **options)
        return path

    return write
