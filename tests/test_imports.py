"""The layers import downwards only, and light stages stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "medmask").rglob("*.py"))
LAYERS = [  # what stands in a line may import from the lines above it, and within its own package
    {"errors"},
    {"io"},
    {"config"},
    {"artifacts", "grid", "builder", "checks"},
    {"runs", "data", "models", "evaluation", "saliency"},
    {"methods"},
    {"train"},
    {"stages"},
    {"plan", "schema", "site", "explain"},
    {"doctor"},
    {"cli", "__main__"},
    {"launch"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
APART = [{"data", "models"}, {"runs", "data"}, {"runs", "models"}, {"evaluation", "data"}, {"evaluation", "models"}]
ALLOWED_PAIRS = {("evaluation.predict", "data"), ("evaluation.predict", "models")}
NUMBERLESS = (
    "errors",
    "io",
    "artifacts",
    "grid",
    "builder",
    "checks",
    "runs",
    "plan",
    "schema",
    "site",
    "doctor",
    "cli",
)
LAZY = {"torchvision", "timm", "matplotlib", "seaborn", "tensorboard"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "medmask").with_suffix("").parts)


def imports(path: Path, top_only: bool = False):
    """(module, line) of each import of a file."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            if node.module == "medmask":
                yield from ((f"medmask.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_downwards(path):
    own = module_of(path).split(".")[0]
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] != "medmask" or len(parts) == 1 or parts[1] not in LEVEL or parts[1] == own or own == "__init__":
            continue
        assert LEVEL[parts[1]] <= LEVEL[own], f"{path}:{line}: {own} imports {name}"
        pair_allowed = (module_of(path), parts[1]) in ALLOWED_PAIRS
        assert pair_allowed or {own, parts[1]} not in APART, f"{path}:{line}: {own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_libraries_have_their_place(path):
    name = module_of(path)
    for imported, line in imports(path):
        library = imported.split(".")[0]
        assert library != "snakemake", f"{path}:{line}"
        assert library != "submitit" or name.startswith("launch."), f"{path}:{line}"
        if name.startswith("config") or name in (
            "errors",
            "io",
            "artifacts",
            "grid",
            "builder",
            "runs",
            "plan",
            "schema",
            "cli",
        ):
            assert library not in ("torch", "numpy", "pandas"), f"{path}:{line}"
        if name.startswith("methods.") and name != "methods.__init__" and imported.startswith("medmask.methods."):
            shared = ("medmask.methods.base", "medmask.methods.meta_gradient")
            assert imported in shared, f"{path}:{line}: methods do not import each other"
    heavy = {imported.split(".")[0] for imported, _ in imports(path, top_only=True)} & LAZY
    assert not heavy or name in (
        "evaluation.figures",
        "evaluation.class_figure",
        "evaluation.coverage_figure",
        "evaluation.curves_figure",
    ), f"{path}: {heavy} imported before they are used"


def modules_after(code: str) -> set[str]:
    text = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_parsing_a_workflow_loads_no_torch_and_no_numpy():
    loaded = modules_after("import medmask.runs, medmask.config.load, medmask.io")
    assert not loaded & {"torch", "numpy", "pandas"}


def test_a_network_of_our_own_loads_no_other_libraries():
    """Training and evaluation of small_cnn, up to the images; torchvision nearly doubles the imports."""
    loaded = modules_after(
        "import medmask.stages.training, medmask.stages.evaluate, medmask.evaluation.predict, medmask.data.images\n"
        "from medmask.models.backbones import build_backbone; build_backbone('small_cnn', 3)"
    )
    assert "torch" in loaded
    assert not loaded & LAZY


@pytest.mark.parametrize(
    "stage",
    ["data", "split", "noise", "runs", "evaluate", "pretrain", "mask", "audit", "finetune", "panels", "aggregate"],
)
def test_the_flags_of_a_stage_need_no_plotting_and_no_network(stage):
    code = f"import medmask.cli; medmask.cli.stage_module('{stage}')"
    assert not modules_after(code) & {*LAZY, "torch"}


def test_package_files_are_empty():
    for path in (ROOT / "medmask").rglob("__init__.py"):
        if path.parent.name not in ("medmask", "methods", "stages"):
            assert not path.read_text().strip(), path


def test_files_are_short():
    long = {module_of(path): n for path in FILES if (n := len(path.read_text().splitlines())) > 300}
    assert not long
