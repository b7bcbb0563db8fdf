"""Where the files of results/ lie that the package ships: the published numbers and mae_mini."""

from pathlib import Path


def shipped(name: str) -> Path:
    """results/NAME: in an installed wheel the copy inside this package (see pyproject.toml), else the checkout's."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "results"
    return (installed if installed.is_dir() else package.parent / "results") / name
