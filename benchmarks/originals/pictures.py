"""A few of the user's photographs, spread over all of them, in a folder of links."""

from pathlib import Path

from mae_core.errors import UserError
from mae_core.listing import list_images


def some_images(data: Path, folder: Path, train: int, val: int = 0) -> Path:
    """folder/{train,val}/CLASS/FILE: links to that many images below data/CLASS/, spread evenly over the sorted list:
    every run of a twin sees the same ones. UserError if there are fewer, or only one class."""
    files = [file for file in list_images(data) if file.parent != data]
    count = train + val
    if len(files) < count or len({file.parent for file in files}) < 2:
        raise UserError(
            f"{data} holds {len(files)} images in class folders; this twin takes {count} of several classes"
        )
    chosen = [files[i * len(files) // count] for i in range(count)]
    held_out = {i * count // val for i in range(val)}
    for number, file in enumerate(chosen):
        place = folder / ("val" if number in held_out else "train") / file.relative_to(data).parts[0]
        place.mkdir(parents=True, exist_ok=True)
        (place / file.name).symlink_to(file.resolve())
    return folder
