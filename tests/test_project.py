"""The shape of the project itself: imports go down the floors, names shadow nothing."""

import ast
import importlib.metadata
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = [
    {
        *("kernels", "_native", "text_clean", "attention", "captions", "convert", "parallel"),
        *("typed_toml", "stop_requests", "whole_files"),
    },
    {
        *("config", "model", "tokenizer", "dataset", "images", "optimizer", "checkpoint"),
        *("metrics", "flops", "text_files", "ray_tasks", "model_weights"),
    },
    {
        *("loader", "evaluation", "report", "prepare", "rewrite"),
        *("run_folder", "engine", "engine_checkpoint", "engine_settings"),
        *("import_weights", "export_weights", "train_step", "watchdog"),
    },
    {"train", "cli", "plan"},
]
# A package that only these modules may import.
OWNED = {
    "deepspeed": {"engine", "engine_checkpoint", "checkpoint"},
    "nvidia": {"images"},
    "triton": {"kernels"},
}


def floor_of(module: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if module in floor)


def sources() -> dict[Path, str]:
    """Every source file of the package with the name of its module or subpackage."""
    found = {path: path.stem for path in (ROOT / "laclip").glob("*.py") if path.stem != "__init__"}
    for package in ("prepare", "rewrite", "evaluation"):
        found |= dict.fromkeys((ROOT / "laclip" / package).rglob("*.py"), package)
    found |= dict.fromkeys((ROOT / "kernels").glob("*.py"), "kernels")
    return found


def imported_names(path: Path) -> list[str]:
    """Dotted names that a file imports at run time; what only type checkers read is left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_every_module_has_a_floor():
    for path, module in sources().items():
        assert any(module in floor for floor in FLOORS), f"{path} stands on no floor"


def test_imports_go_down_the_floors():
    for path, module in sources().items():
        for name in imported_names(path):
            parts = name.split(".")
            if parts[0] != "laclip" or len(parts) < 2 or parts[1] in (module, "__version__"):
                continue
            assert floor_of(parts[1]) < floor_of(module), (
                f"{path.relative_to(ROOT)} (floor {floor_of(module)}) imports {name}"
            )


def test_each_heavy_package_is_imported_where_it_belongs():
    for path, module in sources().items():
        for name in imported_names(path):
            owners = OWNED.get(name.split(".")[0])
            assert owners is None or module in owners, f"{path.relative_to(ROOT)} imports {name}"


def test_no_module_shadows_a_standard_or_installed_one():
    # `deepspeed laclip/train.py` puts laclip/ first on sys.path.
    installed = {
        name
        for name, packages in importlib.metadata.packages_distributions().items()
        if packages != ["laclip"]
    }
    for path in (ROOT / "laclip").iterdir():
        name = path.name.split(".")[0]
        if name.startswith("__") or path.suffix in (".so", ".pyi"):
            continue
        assert name not in sys.stdlib_module_names, f"{path} shadows the standard module {name}"
        assert name not in installed, f"{path} shadows an installed package"


def test_source_files_stay_below_500_lines():
    for pattern in ("laclip/**/*.py", "kernels/*.py", "csrc/*", "benchmarks/*.py", "tests/**/*.py"):
        for path in ROOT.glob(pattern):
            if path.suffix in (".py", ".cpp", ".hpp"):
                lines = len(path.read_text().splitlines())
                assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines: split it"
