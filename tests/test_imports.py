"""Who may import whom, as the source says it (docs in each package's head)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in ("pipeline", "preprocess") for path in (REPOSITORY / package).rglob("*.py"))

PREPROCESS_MAY_IMPORT = (
    "config",
    "configload",
    "cli",  # `python -m preprocess.encode` enters through the command line
    "errors",
    "storage",
    "patterns",
    "rules",
    "tracking",
    "report",
    "data",
    "models",
    "evaluation",
    "training.distributed",
    "philox",
    "progress",
    "launch",
    "malloc",
)
"""Rooms of pipeline that preprocess may use."""

ONLY_IMPORTER = {
    "boto3": {"pipeline/s3.py"},
    "botocore": {"pipeline/s3.py"},
    "deepspeed": {"pipeline/training/engine.py"},
    "wandb": {"pipeline/wandbrun.py"},
    "hydra": {"pipeline/configload.py", "pipeline/sweep.py"},
    "pickle": set(),
}
"""Packages that one file hides from the others."""

PURE = (
    "pipeline/diffusion/",
    "pipeline/data/order.py",
    "pipeline/data/mixture.py",
    "pipeline/data/records.py",
    "pipeline/training/ema.py",
)
"""These know neither where bytes lie nor how many ranks there are."""

LIGHT = tuple(f"pipeline/{name}.py" for name in ("cli", "configcheck", "checkgroups", "checkvalues", "configload"))
LIGHT += tuple(f"pipeline/config/{path.name}" for path in sorted((REPOSITORY / "pipeline/config").glob("*.py")))
LIGHT += ("pipeline/confighelp.py", "pipeline/errors.py")
LIGHT += tuple(f"pipeline/{name}.py" for name in ("storage", "s3", "patterns", "rules", "launch", "progress", "sweep"))
LIGHT += tuple(f"pipeline/{name}.py" for name in ("submit", "sbatch", "jobs"))
"""Imported before a verb is known: nothing heavy at their top."""


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; `from a import b` counts as a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def within(imported: str, *rooms: str) -> bool:
    return any(imported == room or imported.startswith(f"{room}.") for room in rooms)


def sources(prefix: str) -> list[Path]:
    return [path for path in SOURCES if name(path).startswith(prefix)]


def test_pipeline_never_imports_preprocess() -> None:
    found = {name(path): n for path in sources("pipeline/") for n in imports(path) if within(n, "preprocess")}
    assert found == {}


def test_preprocess_imports_only_the_rooms_it_may() -> None:
    allowed = tuple(f"pipeline.{room}" for room in PREPROCESS_MAY_IMPORT)
    found = [
        (name(path), imported)
        for path in sources("preprocess/")
        for imported in imports(path)
        if within(imported, "pipeline") and imported != "pipeline.__version__" and not within(imported, *allowed)
    ]
    assert found == []


@pytest.mark.parametrize("package", sorted(ONLY_IMPORTER))
def test_a_package_is_imported_where_it_is_hidden_and_nowhere_else(package: str) -> None:
    importers = {name(path) for path in SOURCES if any(within(imported, package) for imported in imports(path))}
    assert importers <= ONLY_IMPORTER[package]


def test_pure_rooms_know_neither_storage_nor_ranks() -> None:
    hidden = ("pipeline.storage", "pipeline.training.distributed", "torch.distributed", "boto3")
    found = [
        (name(path), imported)
        for prefix in PURE
        for path in sources(prefix)
        for imported in imports(path)
        if within(imported, *hidden)
    ]
    assert found == []
    assert all(sources(prefix) for prefix in PURE)


def test_what_the_command_line_imports_first_is_light() -> None:
    light = set(__import__("sys").stdlib_module_names)
    for file in LIGHT:
        for imported in imports(REPOSITORY / file, top_level_only=True):
            root = imported.partition(".")[0]
            assert (
                root in light
                or f"{'/'.join(imported.split('.')[:2])}.py" in LIGHT
                or within(imported, "pipeline.cli", "pipeline.config")
            ), f"{file} imports {imported} at its top"


def test_order_needs_numpy_alone() -> None:
    found = [n for n in imports(REPOSITORY / "pipeline/data/order.py") if within(n, "torch", "webdataset", "PIL")]
    assert found == []


def test_no_house_of_helpers() -> None:
    assert [name(path) for path in SOURCES if path.stem in ("utils", "helpers", "manager", "misc", "common")] == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [name(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []
