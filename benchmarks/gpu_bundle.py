"""Put what a GPU machine without network needs into one folder: this project, and wheels of the small libraries.

python benchmarks/gpu_bundle.py --python 3.12        # gpu-bundle/; there: bash gpu-bundle/check.sh

What a machine with PyTorch is taken to have (LARGE) is left out. What else it has stays as it is: `check.sh` installs
only what is missing, into a folder of its own.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

try:
    from mae_core.command_line import answered
    from mae_core.errors import UserError
    from mae_core.machine import COMMIT_FILE, commit
except ModuleNotFoundError as e:
    where = "run it with the Python that has this project installed: .venv/bin/python after `make install`"
    print(f"error: {sys.executable} lacks {e.name}: {where}", file=sys.stderr)
    sys.exit(2)

PROJECT = Path(__file__).parent.parent
LIMIT = 60 * 10**6  # bytes
LARGE = re.compile(
    r"(torch|torchvision|triton|sympy|mpmath|networkx|numpy|scipy|pandas|pyarrow|pillow|scikit-learn|matplotlib|fonttools"
    r"|opencv-.*|nvidia-.*|cuda-.*)="
)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]
CHECK = """#!/usr/bin/env bash
# Install the wheels that this machine's Python lacks into site/, and run the check. Arguments go to gpu_check.py.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$here/project:$here/site" PYTHONUNBUFFERED=1
missing=$("$PYTHON" - "$here"/wheels/*.whl <<'END'
import importlib.metadata, pathlib, sys
for wheel in map(pathlib.Path, sys.argv[1:]):
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
END
)
if [ -n "$missing" ]; then
  xargs -d '\\n' "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$here/site" <<<"$missing"
fi
cd "$here"
exec "$PYTHON" project/benchmarks/gpu_check.py "$@"
"""


def small() -> list[str]:
    """NAME==VERSION of every library that uv.lock has for a user of the project and that is not LARGE."""
    export = ["export", "--quiet", "--frozen", "--extra", "segmentation", "--no-dev", "--no-emit-project"]
    command = [sys.executable, "-m", "uv", *export, "--no-hashes", "--no-annotate", "--no-header"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT)
    if done.returncode != 0:
        raise UserError(f"uv export: {done.stderr.strip() or 'it failed'}")
    pins = [text.split(";")[0].strip() for text in done.stdout.splitlines() if "sys_platform == 'never'" not in text]
    return [pin for pin in pins if not LARGE.match(pin)]


def download(pins: Sequence[str], python: str, folder: Path) -> None:
    """The wheels for that Python on x86-64 Linux. UserError if one is not to be had."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    command += [part for name in PLATFORMS for part in ("--platform", name)]
    done = subprocess.run([*command, *pins], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"wheels for Python {python}: {done.stderr.strip().splitlines()[-1]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12", metavar="VERSION", help="of the GPU machine (default: 3.12)")
    parser.add_argument("--out", type=Path, default=Path("gpu-bundle"), help="default: gpu-bundle")
    args = parser.parse_args(arguments)
    return answered(partial(make, args.python, args.out))


def make(python: str, out: Path) -> int:
    if out.exists() and any(out.iterdir()) and not (out / "check.sh").exists():
        raise UserError(f"--out {out} holds other files: give a new folder")
    shutil.rmtree(out, ignore_errors=True)
    (out / "wheels").mkdir(parents=True)
    (out / "check.sh").write_text(CHECK, encoding="utf-8")
    tracked = subprocess.run(["git", "-C", PROJECT, "ls-files", "-z"], capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        raise UserError(f"{PROJECT} is no git checkout: the bundle is made from one")
    for name in tracked.stdout.rstrip("\0").split("\0"):
        if (PROJECT / name).is_file() and not name.startswith("tests/"):
            (out / "project" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, out / "project" / name)
    # There is no git in the bundle: this file says what ran.
    (out / "project" / COMMIT_FILE).write_text(commit() + "\n", encoding="utf-8")
    download(small(), python, out / "wheels")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > LIMIT:
        raise UserError(f"{out} has {size / 1e6:.0f} MB, above {LIMIT / 1e6:.0f}: LARGE leaves too little out")
    print(f"{out}: {size / 1e6:.1f} MB; copy it to the GPU machine and call: bash {out.name}/check.sh")
    return 0


if __name__ == "__main__":
    sys.exit(main())
