"""The rules that no single file can show: who imports whom, how long a file is, what is never written."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks.suite import TASKS
from tests.fixtures import ROOT

PACKAGES = ("mae_core", "transfer", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).glob("**/*.py"))
# Engines and tables: heavy, optional, or no business of a pre-trainer.
FOREIGN_TO_CORE = {"detectron2", "mmseg", "mmengine", "mmcv", "pandas", "pycocotools", "fvcore"}
LINES = 320
# (who, what) of ours is imported late: --help answers before torch is imported, a plan before scipy is.
LATE = {
    ("benchmarks.run_all", "benchmarks.execute"),
    ("transfer.miniature.imagenet", "transfer.miniature.corruptions"),
    ("mae_core.flops", "torch.utils.flop_counter"),
    *((user, "mae_core.crops") for user in ("mae_core.data", "mae_core.native", "transfer.data.transforms")),
    ("transfer.data.transforms", "transfer.data.loop_free_crop"),
}
# The modules that are an engine's: nobody imports them but where that engine was chosen.
ENGINES = {"transfer.detection.engine_detectron2": "detectron2", "transfer.detection.train_detectron2": "detectron2"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> set[str]:
    """Every module that a file names in an import, late ones included; `from a import b` counts as a and a.b."""
    return modules_named_in(tree_of(path))


def modules_named_in(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import of {node.module}"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def packages_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


def families() -> list[str]:
    """The packages of transfer that define tasks."""
    return [module_of(path.parent / "__init__.py") for path in FILES if path.name == "tasks.py"]


def test_there_is_something_to_read():
    """Else every rule below would hold."""
    assert {"mae_core.vit", "transfer.task", "benchmarks.report"} <= {module_of(path) for path in FILES}
    assert {f"transfer.{name}" for name in ("classification", "detection", "frozen", "segmentation")} == set(families())
    assert "mae_core" in packages_of(ROOT / "transfer" / "task.py")


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("mae_core", {"transfer", "benchmarks"} | FOREIGN_TO_CORE),
        ("transfer", {"benchmarks"}),
    ],
)
def test_arrows_point_one_way(package, never):
    wrong = {module_of(path): packages_of(path) & never for path in FILES if path.parts[len(ROOT.parts)] == package}
    assert {module: names for module, names in wrong.items() if names} == {}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_task_families_never_import_each_other_and_what_they_share_imports_none():
    known = families()
    for path in (path for path in FILES if path.is_relative_to(ROOT / "transfer")):
        foreign = [family for family in known if not within(module_of(path), family)]
        assert not [name for name in imports_of(path) if any(within(name, f) for f in foreign)], path


@pytest.mark.parametrize("absent", ["mmseg", "mmcv", "mmengine", "detectron2", "pandas"])
def test_no_engine_is_imported_before_it_is_needed(absent):
    """Statically here, by Python itself below. An engine's own modules are imported late themselves."""
    own = {module for module, engine in ENGINES.items() if engine == absent}
    for path in FILES:
        if path.is_relative_to(ROOT / "transfer") and module_of(path) not in own:
            top = ast.parse(path.read_text(encoding="utf-8")).body
            names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
            names |= {f"{n.module}.{a.name}" for n in top if isinstance(n, ast.ImportFrom) for a in n.names}
            assert absent not in {name.split(".")[0] for name in names if name}, path
            assert not names & own, path


def test_every_task_family_can_be_imported_without_the_engines():
    """As on a machine that lacks them: their import raises."""
    program = "\n".join(
        [
            "import sys",
            "for name in ('mmseg', 'mmcv', 'mmengine', 'detectron2', 'pandas'): sys.modules[name] = None",
            *(f"import {family}.tasks as t; print(*(task.name for task in t.TASKS))" for family in families()),
        ]
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert {"imagenet_finetune", "imagenet_c"} <= set(done.stdout.split())


def test_no_import_leads_back_to_where_it_came_from():
    """Late imports count too; a package counts for each of its modules, since importing one runs its __init__."""
    modules, graph = {module_of(path) for path in FILES}, {}
    for path in FILES:
        own, wanted = module_of(path), imports_of(path) & modules
        # Of "from package import module" the package is run too, but not for the module's sake.
        named = {name for name in wanted if not any(other.startswith(f"{name}.") for other in wanted)}
        packages = {name.rsplit(".", depth)[0] for name in named for depth in range(1, name.count(".") + 1)}
        graph[own] = {name for name in named | packages if not within(own, name)}
    assert len(graph) > 80
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_imports_inside_functions_are_engines_and_heavy_or_optional_packages():
    late = set()
    for path in FILES:
        functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]
        inside = ast.Module([part for function in functions for part in function.body], [])
        late |= {(module_of(path), name) for name in modules_named_in(inside)}
    allowed = {"matplotlib", "tensorboard", "huggingface_hub", "sklearn", "mmcv", "mmengine", "mmseg"}
    allowed |= {"detectron2", "fvcore", "submitit", "wandb", "trackio", "jinja2", "markupsafe", "plotly", "pyarrow"}
    allowed |= {"pandas", "scipy", "timm", "torchvision"}
    strange = {(module, name) for module, name in late if not {*name.split(".")} & allowed}
    engines = ("transfer.detection.engine_torchvision", "transfer.detection.engine_detectron2")
    strange -= {("transfer.detection.tasks", "transfer.detection")}  # "import engine_..." from it
    strange = {(m, name) for m, name in strange if not any(m == who and within(name, what) for who, what in LATE)}
    assert {(module, name) for module, name in strange if not name.startswith(engines)} == set()


SHARED = [f"transfer/{name}.py" for name in ("task", "run", "jobs", "cli")]
SHARED += [
    "mae_core/settings.py",
    "mae_core/flags.py",
    *(f"benchmarks/{name}.py" for name in ("run_all", "execute", "plan", "children", "suite", "cost")),
]


@pytest.mark.parametrize("file", SHARED)
def test_what_all_tasks_share_names_no_familys_knob(file):
    """Neither as an attribute nor as a word. Pre-training has epochs and warm-up too, a checkpoint has pool."""
    knobs = {field.name for task in TASKS for field in fields(task.recipe("vit_base_patch16", "paper"))}
    knobs -= {"epochs", "warmup_epochs", "pool"}
    assert {"k", "taps", "blocks", "train_fraction", "mixup", "batch", "image_size"} <= knobs
    nodes = list(ast.walk(tree_of(ROOT / file)))
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    named |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert named & knobs == set()


def test_the_top_of_transfer_fits_on_a_screen():
    entries = {path.relative_to(ROOT / "transfer").parts[0] for path in FILES if path.is_relative_to(ROOT / "transfer")}
    assert len(entries) <= 12


def test_importing_our_modules_changes_nothing_global():
    """Libraries are imported first; then what they and Python hold is compared before and after ours."""
    modules = [module_of(path) for path in FILES if path.name != "__main__.py" and module_of(path) not in ENGINES]
    libraries = sorted(name for name in set().union(*map(imports_of, FILES)) if name.split(".")[0] not in PACKAGES)
    program = f"""
import contextlib, importlib, os, pickle, random, signal, sys, warnings
for name in {libraries!r}:
    with contextlib.suppress(ImportError):  # a function, or an engine that is absent
        importlib.import_module(name)
import matplotlib, numpy, timm.data.auto_augment, timm.layers.config, torch
from PIL import Image, ImageFile
def held():
    return (
        dict(timm.data.auto_augment.NAME_TO_OP), timm.layers.config._USE_FUSED_ATTN, list(warnings.filters),
        dict(os.environ), list(sys.path), [signal.getsignal(n) for n in signal.valid_signals()], sys.excepthook,
        torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), random.getstate(),
        pickle.dumps(numpy.random.get_state()), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES,
        dict(matplotlib.rcParams),
    )
before = held()
for name in {modules!r}:
    importlib.import_module(name)
print([number for number, (a, b) in enumerate(zip(before, held())) if a != b])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_enough_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


def committed() -> list[Path]:
    """The Python files under version control, or all there are outside a checkout; but for the tests, of which one
    shows what a malicious pickle would do."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "*.py"], capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.split()] or FILES
    return [path for path in paths if path.exists() and not path.is_relative_to(ROOT / "tests")]


def keywords_of(path: Path) -> set[tuple[str, object]]:
    """(name, value) of every keyword argument that is given a constant."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    constants = ((k.arg, k.value) for call in calls for k in call.keywords if isinstance(k.value, ast.Constant))
    return {(name, value.value) for name, value in constants}


def test_weights_are_read_strictly_and_no_pickle_is_run():
    files = committed()
    assert ("weights_only", True) in set().union(*map(keywords_of, files))
    assert ("strict", True) in set().union(*map(keywords_of, files))
    wrong = {
        path.name: keywords_of(path) & {("strict", False), ("weights_only", False), ("allow_pickle", True)}
        for path in files
    }
    assert {name: found for name, found in wrong.items() if found} == {}


def test_pre_commit_has_the_versions_of_the_lock():
    locked = dict(line.split(" ")[0].split("==") for line in (ROOT / "requirements.lock").read_text().splitlines())
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    revisions = dict(re.findall(r"repo: \S+/(\w+)\S*\n *rev: v(\S+)", hooks))
    assert revisions == {name: locked[name] for name in ("ruff", "codespell")}
