"""Who may import whom: the contracts of pyproject.toml, kept; and no forbidden ways of reading data."""

import ast
import subprocess
import sys
from pathlib import Path

from tools import floors

ROOT = Path(__file__).parents[2]


def test_import_contracts_are_kept():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]


def test_the_map_of_the_floors_is_that_of_the_imports():
    drawn = floors.drawn(floors.floors(), *floors.rooms_and_arrows())
    assert (ROOT / floors.OUT).read_text() == drawn, "the imports changed: make map"


PACKAGES = ("tessera", "serving", "stages", "flows", "studio")
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 60, 8


def test_files_and_functions_are_short_and_take_few_parameters():
    """The parameters of a stage's `run` are the options that dvc.yaml gives it, one for each path: they may be more."""
    found = []
    for path in (path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text()
        if len(text.splitlines()) > LONGEST_FILE:
            found.append(f"{path}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = node.end_lineno - node.lineno + 1
            given = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            number = len([name for name in given if name not in ("self", "cls")])
            is_options = node.name == "run" and path.parent.name == "stages"
            has_reason = "parameters:" in "\n".join(text.splitlines()[max(0, node.lineno - 3) : node.lineno])
            if length > LONGEST_FUNCTION or (number > MOST_PARAMETERS and not is_options and not has_reason):
                found.append(f"{path}:{node.lineno} {node.name}: {length} lines, {number} parameters")
    assert not found


def test_few_modules_are_loose():
    loose = {path.stem for path in (ROOT / "tessera").glob("*.py")} - {"__init__"}
    assert loose == {"params", "plain_yaml", "contracts", "components", "seeding", "system"}


FORBIDDEN_CALLS = {
    "torch.load",
    "torch.save",
    "pickle.load",
    "pickle.loads",
    "eval",
    "exec",
    "os.system",
    "yaml.unsafe_load",
}
PACKAGED_PICKLE = ROOT / "tessera/features/timm.py"  # reads one file of a known sha256, by the reader of tensors alone
FORBIDDEN_METHODS = {"extractall", "extract"}


def test_nothing_that_executes_data_is_called():
    files = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                is_shell = any(
                    word.arg in ("shell", "allow_pickle") and ast.unparse(word.value) == "True"
                    for word in node.keywords
                )
                if name == "torch.load" and path == PACKAGED_PICKLE and "weights_only=True" in ast.unparse(node):
                    continue
                if name in FORBIDDEN_CALLS or name.split(".")[-1] in FORBIDDEN_METHODS or is_shell:
                    found.append(f"{path}:{node.lineno} {name}")
    assert len(files) > 30 and not found


def test_a_stage_starts_without_importing_what_it_does_not_need():
    program = (
        "import sys, stages.train_tokenizer, tessera.tokenizers.diffusers; "
        "names = ('mlflow', 'prefect', 'dvc', 'sklearn', 'torchvision', 'torch_fidelity', 'diffusers'); "
        "print([name for name in names if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
