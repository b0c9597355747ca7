"""Who may import whom: the contracts of pyproject.toml, kept; and no forbidden ways of reading data."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_import_contracts_are_kept():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]


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
FORBIDDEN_METHODS = {"extractall", "extract"}


def test_nothing_that_executes_data_is_called():
    files = [path for folder in ("tessera", "stages", "flows", "studio") for path in (ROOT / folder).rglob("*.py")]
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                is_shell = any(
                    word.arg in ("shell", "allow_pickle") and ast.unparse(word.value) == "True"
                    for word in node.keywords
                )
                if name in FORBIDDEN_CALLS or name.split(".")[-1] in FORBIDDEN_METHODS or is_shell:
                    found.append(f"{path}:{node.lineno} {name}")
    assert len(files) > 30 and not found


def test_a_stage_starts_without_importing_what_it_does_not_need():
    program = (
        "import sys, stages.train_tokenizer; "
        "print([m for m in ('mlflow', 'prefect', 'dvc', 'sklearn', 'torchvision', 'torch_fidelity') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
