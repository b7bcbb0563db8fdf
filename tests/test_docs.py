"""README, docs/ and CONTRIBUTING.md against the code: what they tell a reader to type works, what they name exists."""

import argparse
import contextlib
import dataclasses
import fnmatch
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch

from benchmarks import command as mae_transfer
from benchmarks.report import report
from benchmarks.suite import TASKS
from mae_core.checkpoint import read_checkpoint
from mae_core.errors import UserError
from mae_core.recipe import PretrainRecipe
from mae_core.recipe import recipe as pretraining_recipe
from mae_core.settings import override
from tests.fixtures import ROOT
from tests.fixtures.coco import write_coco
from tests.fixtures.segmentation import write_ade20k
from tests.fixtures.transfer import write_imagenet
from transfer import cli
from transfer.run import read_record

MINI = ROOT / "results" / "miniature" / "mae_mini.safetensors"
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {p.relative_to(ROOT): p.read_text(encoding="utf-8") for p in [*PATHS, ROOT / "results/miniature/README.md"]}
README = PAGES[Path("README.md")]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Commands that tests run with small files in place of the reader's (`run`), and what is added to make them short.
LITTLE = "--recipe mini --workers 0 --device cpu"
ONE_EPOCH = f"{LITTLE} --set epochs=1 warmup_epochs=0 batch=8"
QUICK = {
    "python -m mae_core.checkpoint FILE": "",
    "python -m mae_core.checkpoint --formats": "",
    "python -m mae_core.checkpoint dino.pth --key teacher --convert OUT.safetensors": "",
    "python -m mae_core.checkpoint FILE --to timm OUT.safetensors": "",
    "python -m mae_core.pretrain --data /datasets/imagenet --arch vit_base_patch16 --recipe paper --out runs/mae_b": (
        ONE_EPOCH
    ),
    "python -m mae_core.write_shards --data /datasets/imagenet/train --out imagenet-256 --short 256": "--workers 0",
    "python -m mae_core.reconstruct --ckpt runs/mae_b/mae.safetensors --images DIR --mask-ratio .75 .85 .95 "
    "--out picture.png": "--limit 1",
    "python benchmarks/run_all.py --ckpt mae_vit_l.pth --data /datasets --plan": LITTLE,
    "mae-transfer plan --ckpt FILE --data DIR": LITTLE,
    "mae-transfer plan --ckpt mae_vit_l.pth --data /datasets --json plan.json": LITTLE,
    # Only planned here: tests/transfer/data/test_labelled.py and tests/benchmarks/test_ablations.py train.
    "python benchmarks/run_all.py --ckpt FILE --tasks folder:/path/to/images": (
        f"{LITTLE} --plan --out out --set folder:imagenet.batch=8"
    ),
    "python benchmarks/ablations.py --table 1a --recipe mini --out ablations": "--plan",
    "python -m benchmarks.report --out results": "",
    "mae-transfer export --to latex --out results --file tables.tex": "",
    "mae-transfer export --to hf-card --out results --ckpt mae_mini --file README.md": "",
    "mae-transfer export --to json --out results --file results.json": "",
    "python benchmarks/speed.py pretrain --arch vit_base_patch16 --precision bf16": (
        "--precision fp32 --device cpu --batch 2 --warmup 0 --repeats 1"
    ),
    "python benchmarks/speed.py loader --data /datasets/imagenet/train --workers 16": (
        "--workers 1 --batch 8 --warmup 0 --repeats 1"
    ),
}
SLOW = {
    "mae-transfer run --ckpt FILE --data DIR": f"{LITTLE} --tasks imagenet_knn",
    "python -m transfer.classification --task imagenet_finetune --ckpt FILE --data DIR --seed 1 --set batch=512": (
        ONE_EPOCH
    ),
    "python -m transfer.detection --task coco --ckpt mae_vit_b.pth --data /datasets --out results": (
        f"{LITTLE} --engine torchvision --set epochs=1 warmup_epochs=0 batch=4"
    ),
    "python -m transfer.segmentation --task ade20k --ckpt mae_vit_b.pth --data /datasets --out results": (
        f"{LITTLE} --set iterations=2 warmup_iterations=1"
    ),
}
# What marks a command that no test here runs, and why. Its arguments are still parsed.
NOT_RUN = {
    "^make ": "sets up an environment, or runs these tests",
    "^pip |^uv |-m venv": "needs the network",
    "-m pytest": "these tests",
    "tests.guard": "takes minutes; tests/guard/test_guard.py tests what it compares",
    "--nproc-per-node 8|--gpus 8": "needs eight GPUs",
    "--compare|--reference": "needs the official code",
    "launch.rehearse": "needs a plan; tests/benchmarks/launch/test_rehearse.py runs it",
    "mae-transfer watch": "needs a pre-training at work; tests/benchmarks/test_watch.py runs it",
    "real/": "takes more than an hour, with pictures from the network",
    "gpu_check.py": "needs a GPU; tests/benchmarks/test_gpu_check.py rehearses it",
    "gpu_bundle.py": "needs the network",
    "speed.py (coco|ade20k)": "takes minutes; tests/benchmarks/test_speed_dense.py runs them small",
    "twins.py (upernet|miou)": "tests/benchmarks/test_originals_ade20k.py runs them",
    "dalle_encoder": "needs DALL-E's encoder",
    "demo|unlabelled|docs/images": "takes minutes: the demo, mae_mini and the pictures",
}


def code_lines(text: str) -> list[str]:
    """The lines of indented and fenced blocks, continued ones joined."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"^    .*", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return re.sub(r"\\\n\s*", "", "\n".join([*fenced, *indented])).splitlines()


def commands_of(text: str) -> list[str]:
    """What is typed, without .venv/bin/ and comments."""
    lines = [re.sub(r"\s+# .*", "", line).strip().removeprefix(".venv/bin/") for line in code_lines(text)]
    return [line for line in lines if re.match(r"(python3?|torchrun|pip|make|uv|mae-transfer) ", line)]


COMMANDS = list(dict.fromkeys(command for text in PAGES.values() for command in commands_of(text)))


def test_every_command_is_run_or_has_a_reason_not_to_be():
    not_run = {mark: [command for command in COMMANDS if re.search(mark, command)] for mark in NOT_RUN}
    assert all(not_run.values())
    assert sorted(COMMANDS) == sorted([*QUICK, *SLOW, *{command for found in not_run.values() for command in found}])


# Running them


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("datasets"), train=12)


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """Run a command with small files in place of the reader's, in a folder with a copy of the committed results."""
    torch.save({name: read_checkpoint(str(MINI)).encoder for name in ("student", "teacher")}, tmp_path / "dino.pth")
    shutil.copytree(MINI.parent, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # run_all's, which are for a process of its own
    instead = dict.fromkeys(("FILE", "mae_vit_l.pth", "mae_vit_b.pth", "runs/mae_b/mae.safetensors"), str(MINI))
    instead |= {"/datasets": str(data), "DIR": str(data), "/path/to/images": str(data / "imagenet")}
    instead |= {"vit_base_patch16": "vit_mini_patch8"}

    def small(command: str, more: str) -> None:
        for word, other in instead.items():
            command = re.sub(rf"(?<![\w/]){word}(?![\w.])", other, command)
        with pytest.raises(SystemExit) as ended:
            execute(shlex.split(f"{command} {more}"))
        assert not ended.value.code

    return small


def execute(words: list[str]) -> None:
    """python FILE ..., python -m MODULE ... or mae-transfer ..., in this process."""
    module = words[1] == "-m"
    which, *arguments = words[1 + module :] if words[0] == "python" else words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [which, *arguments])
        if which == "mae-transfer":
            sys.exit(mae_transfer.main())
        elif module:
            runpy.run_module(which, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / which), run_name="__main__")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of runpy, that the module is imported already
@pytest.mark.parametrize("command", QUICK)
def test_a_command_does_what_it_says(command, run):
    run(command, QUICK[command])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # mmengine's
@pytest.mark.parametrize("command", SLOW)
def test_a_command_that_trains_leaves_a_record(command, run, data, tmp_path):
    write_coco(data, train=8)
    write_ade20k(data)
    run(f"{command} --out new", SLOW[command])
    (record,) = tmp_path.glob("new/runs/**/record.json")
    assert read_record(record).status == "ok"


def test_the_task_of_contributing_runs_and_reaches_the_summary(data, tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", section(PAGES[Path("CONTRIBUTING.md")], "Add a task"), re.M | re.S)
    module = types.ModuleType("mean")
    sys.modules["mean"] = module  # where dataclasses look for it
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    call = ["--task", "imagenet_mean", "--ckpt", str(MINI), "--data", str(data), "--out", str(tmp_path)]
    assert cli.main((module.MEAN,), [*call, *LITTLE.split()]) == 0
    (record,) = map(read_record, tmp_path.glob("runs/*/imagenet_mean/*/record.json"))
    assert record.n_eval == 12
    assert record.metrics["top1"] > record.chance
    report(tmp_path)
    assert "imagenet_mean top1" in (tmp_path / "summary.md").read_text(encoding="utf-8")


# Parsing all of them


class Stopped(BaseException):
    """Raised instead of going on after the arguments are parsed."""


def parser_of(words: list[str]) -> argparse.ArgumentParser:
    """The parser to which a command gives its arguments, which it must accept."""
    parse, parsers = argparse.ArgumentParser.parse_args, []

    def stop(parser, *arguments):
        parse(parser, *arguments)
        parsers.append(parser)
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with contextlib.suppress(Stopped):
            execute(words)
    return parsers[0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_the_arguments_of_every_command_are_right(command):
    program, *words = shlex.split(command)
    if program == "make":
        subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)
    elif program in ("pip", "uv") or words[:2] == ["-m", "venv"]:
        extras = re.findall(r"\[(\w+)\]|--extra (\w+)", command)
        assert {pip or uv for pip, uv in extras} <= PYPROJECT["project"]["optional-dependencies"].keys()
    elif words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif words[:2] == ["-m", "pytest"]:
        markers = [m.partition(":")[0] for m in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]]
        assert words[3] in markers if words[2] == "-m" else (ROOT / words[2]).exists()
    else:
        parser_of(["python", *words[2:]] if program == "torchrun" else [program, *words])


PROGRAMS = (
    "-m mae_core.pretrain --data d --arch a --out o",
    "-m mae_core.reconstruct --ckpt c --images i --out o",
    "-m mae_core.write_shards --data d --out o",
    "-m mae_core.checkpoint --formats",
    "-m transfer.classification --task t --ckpt c",
    "-m transfer.detection --task t --ckpt c",
    "-m transfer.frozen --task t --ckpt c",
    "-m transfer.segmentation --task t --ckpt c",
    "-m transfer.miniature --out o",
    "-m benchmarks.report",
    "-m benchmarks.export --to json",
    "-m benchmarks.watch run --tasks t",
    "benchmarks/run_all.py",
    "benchmarks/ablations.py --table 1a",
    "benchmarks/speed.py eval",
    "benchmarks/twins.py pretrain --data d",
    "benchmarks/gpu_check.py",
    "benchmarks/gpu_bundle.py",
    "-m tests.guard",
    "-m benchmarks.launch.rehearse plan.json --gpus 1",
)
# Of tensorboard, torchrun, pip, uv and sky.
OTHERS_FLAGS = {"--logdir", "--nproc-per-node", "--no-build-isolation", "--no-deps", "--frozen", "--extra", "--env"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_flag_exists():
    known = set(OTHERS_FLAGS)
    for program in PROGRAMS:
        known |= parser_of(["python", *program.split()])._option_string_actions.keys()
    for page, text in PAGES.items():
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
        assert named <= known, page


def test_the_commands_of_mae_transfer_are_those_of_its_table():
    assert set(re.findall(r"mae-transfer ([a-z]+)", PAGES[Path("docs/install.md")])) == mae_transfer.COMMANDS.keys()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_setting_is_a_knob(page):
    recipes = [pretraining_recipe("vit_base_patch16", "paper")]
    recipes += [task.recipe("vit_base_patch16", name) for task in TASKS for name in ("paper", "mini")]
    known = {task.name: task.recipe for task in TASKS}
    for typed in re.findall(r"--set ((?:[a-z][\w.:-]*=[^\s`]+ ?)+)", PAGES[page]):
        settings = typed.split()
        name, _, knob = settings[0].partition("=")[0].rpartition(".")
        if knob == "recipe":
            known[name]("vit_base_patch16", settings[0].partition("=")[2])
        elif name:
            override(known[name.partition(":")[0]]("vit_base_patch16", "paper"), [settings[0].removeprefix(f"{name}.")])
        else:
            assert any(accepts(r, settings) for r in recipes), typed


def accepts(recipe, settings: list[str]) -> bool:
    try:
        override(recipe, settings)
    except UserError:
        return False
    return True


def test_the_table_of_pre_training_knobs_names_fields_of_the_recipe():
    table = section(PAGES[Path("docs/pretraining.md")], "Knobs")
    named = [knob for row in re.findall(r"^\| (`.*?) \|", table, re.M) for knob in re.findall(r"`(\w+)`", row)]
    assert len(named) > 8
    assert set(named) <= {field.name for field in dataclasses.fields(PretrainRecipe)}


# What is named


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next of its level or above."""
    level, after = re.search(rf"^(#+) {re.escape(heading)}\n(.*)", text, re.M | re.S).groups()
    return re.split(rf"^#{{1,{len(level)}}} ", after, maxsplit=1, flags=re.M)[0]


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_paths_lead_somewhere(page):
    text, folder = PAGES[page], (ROOT / page).parent
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[\w-]+)?\)", text):
        if not target.startswith("http"):
            assert (folder / target).exists(), target
            assert not anchor or anchor in anchors((folder / target).read_text(encoding="utf-8")), anchor
    for target in re.findall(r'<img src="([^"]+)"', text):
        assert (folder / target).exists(), target
    places = "mae_core|transfer|benchmarks|tests|docs|results/published|results/miniature"
    for named in re.findall(rf"(?<![\w/])((?:{places})/[a-z_0-9./]*)(?![A-Z\w])", text):
        assert (ROOT / named.rstrip(".")).exists(), named


def test_the_map_names_every_package_and_only_what_exists():
    packages = {p.parent for top in ("mae_core", "transfer", "benchmarks") for p in (ROOT / top).rglob("__init__.py")}
    top = within = ROOT
    named = set()
    for line in code_lines(section(README, "Map")):
        places = re.findall(r"[\w/]+(?:\.py|/)(?=[\s:,;)]|$)", line)
        if not line.startswith(" " * 6):
            top = within = ROOT / places.pop(0)
            named.add(top)
        elif places and line.strip().startswith(places[0]) and places[0].endswith("/"):
            within = top / places.pop(0)
            named.add(within)
        else:
            within = top
        assert all(path.exists() for path in (top, within, *(within / place for place in places))), line
    assert packages <= named


def test_the_table_of_tasks_names_exactly_the_tasks():
    rows = re.findall(r"^\| (`.*?) \|", section(README, "Tasks"), re.M)
    named = [name for row in rows for name in re.findall(r"`([\w*]+)", row)]
    tasks = [task.name for task in TASKS]
    assert sorted(found for name in named for found in fnmatch.filter(tasks, name)) == sorted(tasks)
    assert all(fnmatch.filter(tasks, name) for name in named)


def test_the_front_page_is_short_and_its_numbers_are_the_committed_ones():
    assert len(README.splitlines()) <= 130
    committed = (MINI.parent / "tables" / "imagenet.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \*\*.*", README, re.M)
    assert len(rows) == 2
    assert all(row in committed for row in rows)
