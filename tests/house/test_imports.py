"""Who may import whom: the rules of the house (docs/explained/house.md), read off the source.

Files at the top of a package are what one can run; folders are rooms, what they are made of. A room imports from rooms
below it alone, so there is no circle and nothing runs back up.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from made.places import REPOSITORY
from pipeline.verbs import VERBS

PACKAGES = ("latentmill", "pipeline", "preprocess")
SOURCES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
MODULES_IN_A_FOLDER, VERBS_AT_THE_TOP, LINES_IN_A_MODULE = 15, 20, 350

ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "parsing": {"errors"},
    "log": {"parsing"},
    "philox": set(),
    "verbs": set(),
    "conditions": {"errors"},
    "config": {"conditions", "errors"},
    "storage": {"errors"},
    "data": {"conditions", "storage", "philox", "errors"},
    "diffusion": {"config", "philox", "errors"},
    "planning": {"conditions", "data", "storage", "config", "errors"},
    "tracking": {"storage", "config", "errors"},
    "distributed": {"config", "verbs", "errors"},
    "scheduler": {"config", "errors"},
    "models": {"conditions", "diffusion", "planning", "storage", "config", "philox", "errors"},
    "runs": {"conditions", "data", "distributed", "scheduler", "storage", "config", "philox", "errors"},
    "cli": {"config", "distributed", "verbs", "errors"},
    "inference": {
        "conditions",
        "models",
        "runs",
        "diffusion",
        "distributed",
        "data",
        "storage",
        "config",
        "planning",
        "philox",
        "errors",
    },
    "loops": {"data", "distributed", "models", "runs", "storage", "philox", "errors"},
    "report": {"conditions", "tracking", "data", "planning", "runs", "storage", "config", "errors"},
    "jobs": {"runs", "planning", "scheduler", "distributed", "data", "storage", "config", "verbs", "errors"},
    "interchange": {
        "conditions",
        "inference",
        "models",
        "runs",
        "diffusion",
        "data",
        "planning",
        "storage",
        "config",
        "philox",
        "report",
        "errors",
    },
    "evaluation": {"conditions", "inference", "report", "models", "runs", "diffusion", "tracking", "distributed"}
    | {"scheduler", "data", "storage", "config", "philox", "errors"},
    "training": {
        "conditions",
        "evaluation",
        "interchange",
        "inference",
        "runs",
        "data",
        "models",
        "diffusion",
        "tracking",
    }
    | {"distributed", "planning", "storage", "config", "philox", "errors"},
}
"""Room of pipeline -> the rooms that it may import. What is not in a room is a verb, and nobody imports those."""
PREPROCESS = set(ROOMS) - {"training", "jobs", "interchange", "loops"}
"""Rooms of pipeline that preprocess may import."""
PUBLIC = {"pipeline.errors", "pipeline.loops.dataset", "pipeline.loops.tars"}
"""Where the names of the public package come from."""
BY_NAME = {
    ("pipeline/demo.py", "pipeline.cli"),
    ("preprocess/synthetic.py", "pipeline.cli"),
    ("pipeline/report/page.py", "pipeline.cli"),
}
"""Verbs that enter by the command line: `python -m`, and the demo's steps."""

ONLY_IMPORTERS = {
    "boto3": {"pipeline/storage/s3.py"},
    "botocore": {f"pipeline/storage/{name}.py" for name in ("s3", "answers", "pace")},
    "deepspeed": {"pipeline/training/engines/deepspeed.py"},
    "huggingface_hub": {"pipeline/interchange/hub/client.py"},
    "wandb": {"pipeline/tracking/wandb_run.py"},
    "tensorboard": {"pipeline/tracking/event_files.py"},
    "torch.utils.tensorboard": {"pipeline/tracking/event_files.py"},
    "hydra": {"pipeline/config/loading/load.py", "pipeline/config/loading/overrides.py"},
    "pyarrow": {"preprocess/gathering/arrow.py"},
    "webdataset": {"pipeline/loops/tars.py"},
    "pickle": set(),
}
"""Packages that one file hides from the others."""

WITHOUT_TORCH = (
    *("errors", "log", "parsing", "verbs", "conditions", "config", "storage", "scheduler", "planning", "jobs", "cli"),
    *("runs/directory", "runs/lease", "runs/datasets"),
    *("distributed/children", "distributed/meeting", "distributed/endings", "distributed/under"),
    *("distributed/place", "distributed/ranks", "distributed/exits", "distributed/signals", "distributed/rank"),
)
"""A login node imports these in a moment: no PyTorch with them, at any depth. planning/flops.py is one that counts."""
WITH_TORCH = {"pipeline.planning.flops"}


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def module(path: Path) -> str:
    return name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module(path): path for path in SOURCES}


def within(imported: str, *rooms: str) -> bool:
    return any(imported == room or imported.startswith(f"{room}.") for room in rooms)


def statements(tree: ast.AST, *, at_import: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements. at_import: those alone that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (at_import and (later or for_types)):
            yield from statements(node, at_import=at_import)


@cache
def imports(path: Path, at_import: bool = False) -> tuple[str, ...]:
    """Dotted names that a file imports; `from a import b` counts as a.b."""
    found: list[str] = []
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), at_import=at_import):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


def module_of(imported: str) -> str:
    """The module of ours that an imported name lies in; "" for others' packages."""
    while imported and imported not in MODULES:
        imported = imported.rpartition(".")[0]
    return imported


def room(path: Path) -> str:
    """The room of pipeline that a file is in; "" for a verb."""
    parts = module(path).split(".")
    return parts[1] if parts[0] == "pipeline" and len(parts) > 1 and parts[1] in ROOMS else ""


def test_a_room_imports_the_rooms_below_it_alone() -> None:
    """`preprocess` and the verbs may use what lies below them, and nobody imports a verb."""
    wrong = []
    for path in SOURCES:
        for imported in map(module_of, imports(path)):
            parts = imported.split(".")
            if not imported or (name(path), imported) in BY_NAME or (len(parts) < 2 and parts[0] != "latentmill"):
                continue
            mine, theirs = room(path), parts[-1] if parts[0] == "latentmill" else parts[1]
            if path.is_relative_to(REPOSITORY / "latentmill"):
                fine = imported in PUBLIC
            elif parts[0] == "preprocess":
                fine = path.is_relative_to(REPOSITORY / "preprocess")
            elif path.is_relative_to(REPOSITORY / "preprocess"):
                fine = theirs in PREPROCESS
            elif mine:
                fine = theirs in {mine, "log", "parsing", *ROOMS[mine]}
            else:
                fine = theirs in ROOMS
            if not fine:
                wrong.append(f"{name(path)} imports {imported}")
    assert not wrong, "\n".join(sorted(wrong))


def test_the_rules_themselves_have_no_circle() -> None:
    above: dict[str, set[str]] = dict(ROOMS)
    while above:
        floor = {one for one, below in above.items() if not below & set(above)}
        assert floor, f"a circle of rooms: {sorted(above)}"
        above = {one: below for one, below in above.items() if one not in floor}


def test_no_module_is_in_a_circle_of_imports() -> None:
    """Also not by imports inside functions; TYPE_CHECKING's are for readers and checkers."""
    edges = {
        one: {module_of(imported) for imported in _but_for_types(path)} - {one, ""} for one, path in MODULES.items()
    }
    while edges:
        leaves = {one for one, below in edges.items() if not below & set(edges)}
        assert leaves, f"a circle among {sorted(edges)}"
        edges = {one: below for one, below in edges.items() if one not in leaves}


def _but_for_types(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = [ast.Pass()]
    for node in statements(tree, at_import=False):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", sorted(ONLY_IMPORTERS))
def test_a_package_is_imported_where_it_is_hidden_and_nowhere_else(package: str) -> None:
    importers = {name(path) for path in SOURCES if any(within(imported, package) for imported in imports(path))}
    assert importers <= ONLY_IMPORTERS[package]


def test_a_login_node_needs_no_torch() -> None:
    """Nothing heavy is imported with these, by whatever way."""
    heavy = ("torch", "deepspeed", "diffusers", "transformers", "open_clip", "wandb", "tensorboard")
    wrong = []
    for one, path in MODULES.items():
        inner = name(path).removeprefix("pipeline/").removesuffix(".py")
        if one in WITH_TORCH or not any(inner == light or inner.startswith(f"{light}/") for light in WITHOUT_TORCH):
            continue
        reached, todo = {one}, [one]
        while todo:
            for imported in imports(MODULES[todo.pop()], True):
                if within(imported, *heavy):
                    wrong.append(f"{name(path)} reaches {imported}")
                ours = module_of(imported)
                if ours and ours not in reached:
                    reached.add(ours)
                    todo.append(ours)
    assert not wrong, "\n".join(sorted(wrong))
    assert all(
        (REPOSITORY / "pipeline" / light).is_dir() or (REPOSITORY / "pipeline" / f"{light}.py").is_file()
        for light in WITHOUT_TORCH
    )


def test_diffusers_and_open_clip_are_imported_when_encoders_are_built() -> None:
    """Their import takes seconds, which a command that fails early or uses no encoders should not wait for."""
    heavy = ("diffusers", "open_clip", "transformers", "timm")
    packages = "pipeline.models.encoders.packages"
    assert {one for one, path in MODULES.items() if any(within(i, *heavy) for i in imports(path, True))} == {packages}
    assert not any(within(i, packages) for path in SOURCES for i in imports(path, True))


def test_what_the_command_line_imports_first_is_the_standard_librarys_and_light() -> None:
    for one in ("pipeline.cli", "pipeline.verbs", "pipeline.errors", "pipeline.distributed.exits"):
        for imported in imports(MODULES[one], True):
            assert imported.partition(".")[0] in sys.stdlib_module_names or module_of(imported), f"{one}: {imported}"


def test_pure_rooms_know_neither_storage_nor_ranks() -> None:
    """Which record comes when, and the objective, are arithmetic."""
    files = ("data/order/shuffle.py", "data/order/mixture.py", "data/format/records.py", "training/ema.py")
    for prefix in ("pipeline/diffusion/", *(f"pipeline/{file}" for file in files)):
        inside = [path for path in SOURCES if name(path).startswith(prefix)]
        assert inside, prefix
        for path in inside:
            hidden = [one for one in imports(path) if within(one, "pipeline.storage", "pipeline.distributed", "boto3")]
            assert hidden == [], f"{name(path)} imports {hidden}"
            assert not any(within(one, "torch.distributed") for one in imports(path)), name(path)
    order = imports(REPOSITORY / "pipeline/data/order/shuffle.py")
    assert not any(within(one, "torch", "webdataset", "PIL") for one in order)


def test_no_folder_is_too_full_and_no_module_too_long() -> None:
    modules = Counter(path.parent for path in SOURCES if path.name != "__init__.py")
    for folder, many in modules.items():
        most = VERBS_AT_THE_TOP if folder == REPOSITORY / "pipeline" else MODULES_IN_A_FOLDER
        assert many <= most, f"{name(folder)} has {many} modules: two rooms in one?"
    long = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {file: lines for file, lines in long.items() if lines > LINES_IN_A_MODULE} == {}


def test_every_verb_is_a_file_at_the_top() -> None:
    """`report` is the page of its room, which the demo writes as well."""
    for verb, (where, _) in VERBS.items():
        assert where in MODULES
        assert where.count(".") == 1 or verb == "report"


def test_no_house_of_helpers() -> None:
    words = ("utils", "helpers", "manager", "misc", "common", "base_utils")
    assert [name(path) for path in SOURCES if {path.stem, path.parent.name} & set(words)] == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [name(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []
