"""Compile the reader of training images for this machine: python -m mae_core.native"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from mae_core.command_line import answered
from mae_core.errors import UserError
from mae_core.native import SOURCES, library_path, load

# No fused multiplications: they would round otherwise than torch. AVX2 is checked as the library is loaded.
FLAGS = ("-O3", "-mavx2", "-ffp-contract=off", "-shared", "-fPIC")
REMEDY = "images are read by torchvision, more slowly; on Debian: apt install gcc libc6-dev libjpeg-dev"


def build(path: Path) -> None:
    """Compile the library to that path, by $CC or cc. UserError if that fails or the pixels are not torchvision's."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    source = next(source for source in SOURCES if source.name == "sample.c")
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        done = subprocess.run(
            [*compiler, *FLAGS, str(source), "-o", str(unfinished), "-ljpeg", "-lm"], capture_output=True, text=True
        )
        if done.returncode:
            why = next((line for line in done.stderr.splitlines() if "error" in line), "it failed")
            raise UserError(f"{compiler[0]} cannot compile {source} ({why.strip()}): {REMEDY}")
        if load(unfinished) is None:
            raise UserError(f"what {compiler[0]} made of {source} does not give torchvision's pixels here: {REMEDY}")
        unfinished.replace(path)
    except FileNotFoundError:
        raise UserError(f"there is no C compiler {compiler[0]}: {REMEDY}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def main() -> int:
    path = library_path()
    if load(path) is None:
        build(path)
    for other in path.parent.glob("sample-*.so"):
        if other != path:
            other.unlink()
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(answered(main))
