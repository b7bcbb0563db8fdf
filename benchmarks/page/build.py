"""The page: what its template is given, and the file as text."""

import base64
import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from benchmarks.checkpoints import pretraining
from benchmarks.page.biography import biography
from benchmarks.page.content import Book, everything, filled, grid, overview
from benchmarks.page.curves import other_trainings, trainings
from benchmarks.page.pictures import pictures_of
from benchmarks.page.plots import Plot, plots_of
from benchmarks.page.series import Block, blocks_of, identities, styles_of
from benchmarks.render import circumstances, without_paths
from benchmarks.rows import Section
from mae_core.claim import SILENT, Watch
from mae_core.files import printable
from transfer.task import Record

HERE = Path(__file__).parent
RELOAD = 30  # seconds between two looks at the file while jobs are at work


def page(
    out: Path,
    found: Sequence[tuple[Record, Path]],
    unreadable: Sequence[str],
    sections: dict[Section, list[Record]],
    title: Callable[[Record], str],
    going: bool,
) -> str:
    """The page of all records. found: each with its file. title: of a record's data. going: more jobs will follow; else
    the claims below `out` say whether any are at work. The same files give the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    records = [record for record, _ in found]
    folders = {id(record): path.parent for record, path in found}
    paths = [printable(str(path.relative_to(out))) for _, path in found]
    found_blocks = blocks_of(sections)
    styles, book = styles_of(found_blocks), Book({id(record): i for i, record in enumerate(records)})
    plots: list[Plot] = []

    def drawn(new: Sequence[Plot]) -> list[tuple[int, Plot]]:
        """The plots that have something to show, with their numbers in the page's data."""
        kept = [plot for plot in new if plot.panels]
        plots.extend(kept)
        return list(enumerate(kept, len(plots) - len(kept)))

    blocks = []
    where: dict[int, Block] = {}
    for block in found_blocks:
        where |= {id(record): block for record in block.records}
        tables = filled(block, book)
        blocks.append(
            {
                "block": block,
                "facts": circumstances(block.records),
                "identities": identities(block),
                "overview": overview(block, tables),
                "grids": [grid(table) for table in tables],
                "plots": drawn([*plots_of(block, styles), trainings(block, styles, folders)]),
            }
        )
    others = drawn(other_trainings(out, folders.values()))
    shown, left = pictures_of(out, records, folders)
    listed = everything(records, paths)
    for line in listed:
        r, block = line["record"], where[id(line["record"])]
        line["story"] = book.tell(f"{line['identity'].label}: {r.task}, seed {r.seed}", line["text"], r.metric, [r])
        line |= {"recipe": block.recipe, "data": block.data}
    data = {
        "plots": [[{"traces": p.traces, "layout": p.layout} for p in plot.panels] for plot in plots],
        "stories": book.stories,
        "records": [biography(r, path, title(r)) for r, path in zip(records, paths)],
    }
    script, (library, hash_of_library) = read("page.js"), plotly()
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["away"] = without_paths
    return environment.get_template("page.html").render(
        style=Markup(read("page.css")),
        script=Markup(script),
        hashes=[digest(script), hash_of_library],
        library=Markup(library if plots else ""),
        data=Markup(packed(json.dumps(data, sort_keys=True, separators=(",", ":")))),
        blocks=blocks,
        styles=styles,
        others=others,
        pictures=[(picture, where.get(id(picture.record))) for picture in shown],
        pictures_left=left,
        missing=[line for line in listed if line["record"].status != "ok"],
        unreadable=[without_paths(text.replace(f"{out}/", "")) for text in unreadable],
        listed=listed,
        checkpoints=checkpoints(records),
        recipes=list(dict.fromkeys(line["recipe"] for line in listed)),
        sets=list(dict.fromkeys(line["data"] for line in listed)),
        working=(working := at_work(out)),
        reload=RELOAD if going or working else 0,
    )


def read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@cache
def plotly() -> tuple[str, str]:
    """Plotly's own script, packed, and its hash: 5 MB that become 2."""
    from plotly.offline import get_plotlyjs

    script = get_plotlyjs()
    return packed(script), digest(script)


def packed(text: str) -> str:
    """The text compressed, as the page's script unpacks it. No time is in it."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), mtime=0)).decode("ascii")


def digest(script: str) -> str:
    """What the page's Content-Security-Policy calls a script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}"


def checkpoints(records: Sequence[Record]) -> list[tuple[str, ...]]:
    keys = ("name", "arch", "format")
    return sorted(
        {
            tuple(str(r.checkpoint.get(key) or "-") for key in keys)
            + (pretraining(r.checkpoint) or "-", str(r.checkpoint.get("sha256") or "-"))
            for r in records
        }
    )


def at_work(out: Path) -> list[str]:
    """The work folders below out/runs that a job is at work in, relative to it. The claim of another machine counts if
    it was touched not long before that of whoever writes this page, so that only the file system's clock is asked."""
    now = max((path.stat().st_mtime for path in (out / "tables").glob(".claim.*")), default=0.0)
    found = []
    for folder in sorted({path.parent for path in (out / "runs").rglob(".claim.*")}):
        watch = Watch(folder)
        if watch.holder() is not None and (watch.certain or watch.seen[1] / 1e9 > now - SILENT):
            found.append(printable(str(folder.relative_to(out / "runs"))))
    return found
