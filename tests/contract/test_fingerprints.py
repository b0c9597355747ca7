"""What makes an entry of the graph stale, and what does not: the code that it can reach, as it reads without its comments."""

import ast
import json
import re
import shutil
from pathlib import Path

import grimp
import pytest
import yaml
from dvc.repo import Repo
from test_names import FOLDERS

from tessera import params as all_params
from tessera.code import changes, entries
from tessera.code.definitions import ON_IMPORT, Code, Module
from tessera.components import parse
from tessera.params import KEYS_DVC_IGNORES

ROOT = Path(__file__).parents[2]
MASKED = {"train_prior@vqgan-masked", "sample_images@vqgan-masked", "edit_images@vqgan-masked"}
ABOUT_ALL = {"compare_systems", "write_report"}  # their params are all systems and tokenizers, with every part in them
TRAININGS = ("train_features", "train_tokenizer", "train_prior")


@pytest.fixture(scope="module")
def params() -> all_params.Pipeline:
    return all_params.read(ROOT / "params.yaml")


@pytest.fixture(scope="module")
def graph(params) -> list[entries.Entry]:
    return entries.read(params, ROOT / "dvc.yaml")


@pytest.fixture(scope="module")
def fingerprints(graph) -> dict[str, dict[str, str]]:
    return fingerprints_of(ROOT, graph)


def fingerprints_of(root: Path, graph: list[entries.Entry]) -> dict[str, dict[str, str]]:
    code = Code(root, entries.PACKAGES)
    return {entry.name: entries.code_of(entry.params, entry.stage, code) for entry in graph}


@pytest.fixture
def copy(tmp_path) -> Path:
    """The code of the project, to change."""
    for package in entries.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def stale(copy: Path, graph: list[entries.Entry], fingerprints: dict[str, dict[str, str]]) -> set[str]:
    """The entries that the changed copy of the code makes stale."""
    now = fingerprints_of(copy, graph)
    return {name for name, code in now.items() if code != fingerprints[name]}


def edit(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.MULTILINE)
    assert count, f"{pattern} is not in {path}"
    path.write_text(text)


def test_comments_docstrings_positions_and_annotations_of_any_file_change_nothing(copy, graph, fingerprints):
    files = sorted(path for path in copy.rglob("*.py") if path.stat().st_size)
    assert len(files) > 100
    for path in files:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.returns = ast.Constant("other")
                node.body.insert(0, ast.Expr(ast.Constant("Another docstring.")))
                if ast.get_docstring(ast.Module(node.body[1:], [])) is not None:
                    del node.body[1]
        path.write_text("# a comment\n\n\n" + ast.unparse(ast.fix_missing_locations(tree)) + "\n")
    assert stale(copy, graph, fingerprints) == set()


def test_what_runs_tracks_and_shows_progress_is_reached_by_no_entry(fingerprints):
    """The one exclusion, and its reason: a stage is handed its job, by a protocol (contracts.Job), and asks it for nothing that
    could decide a number. That no stage imports the runner is a contract of import-linter, too."""
    for name, code in fingerprints.items():
        reached = {definition for definition in code if re.match(r"tessera\.(running|tracking|code)\.", definition)}
        assert not reached, name


def test_no_module_with_a_say_in_results_imports_what_runs_them():
    imports = grimp.build_graph("stages", "tessera", cache_dir=None)
    outside = {m for m in imports.modules if re.match(r"tessera\.(running|tracking|code)(\.|$)", m)}
    assert len(outside) > 10
    for module in imports.modules - outside:
        assert not imports.find_modules_directly_imported_by(module) & outside, module


@pytest.mark.parametrize("folder", ["running", "tracking", "code"])
def test_a_changed_line_of_what_runs_and_tracks_makes_nothing_stale(copy, graph, fingerprints, folder):
    for path in (copy / "tessera" / folder).glob("*.py"):
        path.write_text(path.read_text() + "\nADDED = 3\n")
        for line in path.read_text().splitlines():
            if '"' in line and line.strip().startswith("return f"):
                path.write_text(path.read_text().replace(line, line.replace('"', '"changed ', 1)))
    assert stale(copy, graph, fingerprints) == set()


def test_a_changed_constant_of_one_prior_makes_its_cells_stale_and_no_other(copy, graph, fingerprints):
    edit(copy / "tessera/priors/masked.py", r"^BOUND_DRAWS = (\d+)", "BOUND_DRAWS = 1\\1")
    assert stale(copy, graph, fingerprints) == MASKED | ABOUT_ALL


def test_a_changed_quantizer_makes_the_tokenizers_that_use_it_stale(copy, graph, fingerprints):
    edit(copy / "tessera/quantizers/vector.py", r"self\.codebook_size = ", "self.codebook_size = 0 + ")
    found = stale(copy, graph, fingerprints)
    assert found == {"train_tokenizer@vqvae", "train_tokenizer@vqgan"} | ABOUT_ALL


def test_a_changed_training_loop_makes_every_training_stale(copy, graph, fingerprints):
    edit(copy / "tessera/training/reading.py", r"step \* batch_size", "batch_size * step")
    found = stale(copy, graph, fingerprints)
    assert found == {entry.name for entry in graph if entry.stage in TRAININGS}


def test_a_function_that_a_module_gains_makes_no_user_of_the_others_stale(copy, graph, fingerprints):
    path = copy / "tessera/nn/transformer.py"
    path.write_text(path.read_text() + "\n\ndef another(x):\n    return x\n")
    assert stale(copy, graph, fingerprints) == set()


def test_what_a_part_checks_before_a_run_makes_nothing_stale_unless_something_else_calls_it(copy, graph, fingerprints):
    path = copy / "tessera/priors/masked.py"
    path.write_text(path.read_text() + "\n\ndef problems(config, planned):\n    yield from ()\n")
    assert stale(copy, graph, fingerprints) == set()
    path.write_text(path.read_text() + "\n\ndef other(config):\n    return problems(config, None)\n")
    code = entries.code_of(graph_entry(graph, "train_prior@vqgan-masked").params, code=Code(copy, entries.PACKAGES))
    assert "tessera.priors.masked.problems" in code


def graph_entry(graph: list[entries.Entry], name: str) -> entries.Entry:
    return next(entry for entry in graph if entry.name == name)


def test_a_key_that_parts_gained_later_makes_stale_who_sets_it_and_nobody_else(copy, graph, fingerprints):
    """As if nobody had ever written the key `init`, and then as if the code that it turns on were another."""
    init = {"from": "data/tokenizers/vqgan", "sha256": "0" * 64}
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["tokenizers"]["vqvae"]["init"] = values["systems"]["gan"]["prior"]["init"] = init
    setting = entries.read(parse(all_params.Pipeline, values), ROOT / "dvc.yaml")
    of_setting = fingerprints_of(ROOT, setting)
    begun = {"train_tokenizer@vqvae", "train_prior@gan"}
    assert {name for name in of_setting if of_setting[name] != fingerprints[name]} == begun | ABOUT_ALL
    assert all("tessera.training.warm_start.begin" in of_setting[name] for name in begun)
    path = copy / "tessera/training/warm_start.py"
    path.write_text(path.read_text().replace("strict=False", "strict=True"))
    assert stale(copy, setting, of_setting) == begun
    for file in ("tessera/bases/autoencoder.py", "tessera/bases/conditional.py"):
        edit(copy / file, r"^    init: AddedKey.*\n", "")
    for stage in ("train_tokenizer", "train_prior"):
        for _ in range(2):
            edit(copy / f"stages/{stage}.py", r'^ +if sets\(config, "init"\):\n.*\n', "")
    assert stale(copy, graph, fingerprints) == set()


def test_params_that_do_not_set_an_added_key_are_recorded_as_before_there_was_one(params):
    for config in (params.tokenizers["vqgan"], params.systems["vqgan-flow"].prior):
        assert "init" not in entries.plain(config) and "init" in type(config).model_fields
        init = {"from": "x", "sha256": "0" * 64}
        assert entries.plain(parse(type(config), entries.plain(config) | {"init": init}))["init"] == init


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ('if sets(config, "new"):\n        y = 2', False),
        ('if sets(config, "new"):\n        y = 2\n    else:\n        y = 3', True),
        ('if not sets(config, "new"):\n        y = 2', True),
        ('if other(config, "new"):\n        y = 2', True),
        ("if sets(config, key):\n        y = 2", True),
    ],
)
def test_what_an_added_key_turns_on_is_told_by_its_form_alone(tmp_path, line, counts):
    path, before = tmp_path / "m.py", tmp_path / "before.py"
    path.write_text(f"def f(config, key):\n    y = 1\n    {line}\n    return y\n")
    before.write_text("def f(config, key):\n    y = 1\n    return y\n")
    old = Module("m", before).definitions["f"].digest
    assert (Module("m", path).definitions["f"].digest != old) == counts
    assert Module("m", path, frozenset({"new"})).definitions["f"].digest != old


@pytest.mark.parametrize("folder", sorted({*FOLDERS} - {"datasets"}))
def test_a_new_part_makes_nothing_stale_until_it_is_used(copy, graph, fingerprints, folder):
    some = next(path for path in sorted((copy / "tessera" / folder).glob("*.py")) if path.stem != "__init__")
    shutil.copy(some, some.with_name("brand_new.py"))  # in no index and no list
    assert stale(copy, graph, fingerprints) == set()


def test_what_a_module_does_when_it_is_imported_counts_with_any_of_its_definitions(copy, graph, fingerprints):
    path = copy / "tessera/seeding.py"
    path.write_text(path.read_text() + "\ntorch.use_deterministic_algorithms(True)\n")
    drawing = {name for name, code in fingerprints.items() if any(d.startswith("tessera.seeding.") for d in code)}
    assert stale(copy, graph, fingerprints) == drawing > MASKED


def test_another_name_from_another_project_counts(copy, graph, fingerprints):
    edit(copy / "tessera/nn/transformer.py", r"^import torch.nn.functional as F", "import torch.special as F")
    assert stale(copy, graph, fingerprints) > {"train_prior@vqgan-masked"}


@pytest.mark.parametrize(
    ("before", "after", "counts"),
    [
        ('raise ValueError(f"{x} is odd")', 'raise ValueError(f"expected an even number, got {x}")', False),
        ('raise ValueError(f"{x} is odd")', 'raise OSError(f"{x} is odd")', True),
        ('raise ValueError(f"{x} is odd")', 'raise ValueError(f"{x + 1} is odd")', True),
        ('job.say(f"{x} images")', 'job.say(f"{x} pictures")', False),
        ('job.log("a", x)', 'job.log("b", x)', True),
        ("y: int = x", "y: float = x", False),
        ("y: int = x", "y: int = x + 1", True),
        ("y = 1.0", "y = 1", True),
        ('y = "a"', 'y = "b"', True),
        ("y = x", "'''A note.'''\n    y = x  # why", False),
    ],
)
def test_wording_does_not_count_and_what_is_computed_does(tmp_path, before, after, counts):
    digests = []
    for number, line in enumerate((before, after)):
        path = tmp_path / f"m{number}.py"
        path.write_text(f"def f(x):\n    {line}\n    return x\n")
        digests.append(Module("m", path).definitions["f"].digest)
    assert (digests[0] != digests[1]) == counts


def test_fields_of_a_class_count_with_their_annotations(tmp_path):
    digests = []
    for number, annotation in enumerate(("int", "float")):
        (tmp_path / f"m{number}.py").write_text(f"class C:\n    x: {annotation} = 3\n")
        digests.append(Module("m", tmp_path / f"m{number}.py").definitions["C"].digest)
    assert digests[0] != digests[1]


def test_a_name_is_followed_through_modules_that_import_it_in_turn(tmp_path):
    (tmp_path / "p").mkdir()
    for name, text in {
        "a": "from p import b\nfrom p.c import deep as shallow\ndef f():\n    return b.g(), shallow()\n",
        "b": "from p.c import g\n",
        "c": "K = 1\nL = 2\ndef g():\n    return K\ndef deep():\n    return 0\ndef unused():\n    return L\n",
    }.items():
        (tmp_path / "p" / f"{name}.py").write_text(text)
    assert set(Code(tmp_path, ["p"]).reached_from(["p.a.f"])) == {"p.a.f", "p.c.g", "p.c.K", "p.c.deep"}
    assert set(Code(tmp_path, ["p"]).reached_from(["p.c"])) == {f"p.c.{n}" for n in ("g", "K", "L", "deep", "unused")}
    with pytest.raises(ValueError, match=r"there is no p\.a\.h in "):
        Code(tmp_path, ["p"]).reached_from(["p.a.h"])


def test_the_closure_of_definitions_lies_within_that_of_imports(fingerprints):
    """Beside an independent reader: no module is reached that grimp does not find imported, by the stage or by its parts."""
    imports = grimp.build_graph("stages", "tessera", cache_dir=None)
    for name, code in fingerprints.items():
        modules = {definition.rpartition(".")[0] for definition in code}
        stage = next(module for module in modules if module.startswith("stages."))
        parts = {module for module in modules if module.split(".")[1] in FOLDERS}
        allowed = {stage, *parts}.union(*(imports.find_upstream_modules(module) for module in (stage, *parts)))
        assert modules <= allowed, name


def test_assignments_at_the_top_of_a_module_bind_names_and_do_nothing_else():
    """They count only where their name is used, so none may configure something on the way: calls are of harmless kinds."""
    harmless = {
        "AfterValidator", "Annotated", "Field", "NamedTuple", "Path", "Shown", "Sizes", "TypeVar", "frozenset", "int", "part",
        "range", "re.compile", "timedelta", "tuple", "name_or_part",
    }  # fmt: skip
    for package in entries.PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                    called = {ast.unparse(call.func) for call in ast.walk(node.value) if isinstance(call, ast.Call)}
                    assert called <= harmless or {"running", "tracking", "code"} & set(path.parts), f"{path}: {called}"


def test_modules_with_a_say_in_results_do_nothing_on_import_but_define(fingerprints):
    found = {name for code in fingerprints.values() for name in code if name.endswith(ON_IMPORT)}
    assert found == set(), "statements that run on import count for every user of the module: put them into a function"


def test_every_entry_of_the_graph_depends_on_its_own_file_and_no_other_code(graph):
    with Repo(ROOT) as repo:
        stages = {stage.addressing: stage for stage in repo.index.stages}
    assert set(stages) == {entry.name for entry in graph} | {entries.FINGERPRINTS}
    for name, stage in stages.items():
        deps = {str(dep.def_path) for dep in stage.deps}
        if name == entries.FINGERPRINTS:
            assert {"tessera", "stages", "params.yaml"} <= deps
        else:
            assert [dep for dep in deps if dep.startswith("data/code")] == [f"data/code/{name}"]
            assert not [dep for dep in deps if dep.endswith(".py")]
            assert stage.cmd.startswith("exec python -m tessera.running "), "begin its cmd in dvc.yaml with: exec"


NOT_LISTED = {  # sections of params that a stage reads and dvc.yaml does not list, and what it depends on instead
    ("train_prior", "dataset"): "its name stands in the images, which are a dependency",
    ("edit_images", "features"): "their names are those of the folders of data/features",
}


def test_every_section_of_params_that_a_stage_reads_is_listed_in_dvc_yaml(graph, fingerprints):
    code, needless = Code(ROOT, entries.PACKAGES), set(NOT_LISTED)
    for entry in graph:
        listed = {path.split(".")[0] for path in entry.params}
        for name in fingerprints[entry.name]:
            module, _, definition = name.rpartition(".")
            known = code.module(module).definitions.get(definition)
            read = {use.attribute for use in known.uses if use.name == "params" and use.attribute} if known else set()
            for section in read & set(all_params.Pipeline.model_fields) - listed:
                assert (entry.stage, section) in NOT_LISTED, f"{entry.name} reads params.{section} in {name}"
                needless.discard((entry.stage, section))
    assert not needless


def test_defaults_that_nobody_wrote_are_in_the_file_of_an_entry(params, graph):
    entry = next(entry for entry in graph if entry.name == "train_prior@vqgan-flow")
    text = changes.as_text({}, {key: entries.plain(value) for key, value in entry.params.items()})
    settings = json.loads(text)["params"]
    assert settings["follow_training"]["features"]["kind"] == "random"
    assert "label_dropout" not in (ROOT / "params.yaml").read_text()
    assert settings["systems.vqgan-flow.prior"]["label_dropout"] == params.systems["vqgan-flow"].prior.label_dropout


def test_the_change_of_an_entry_is_told_by_its_definitions():
    before = {"tessera.a.f": "1", "tessera.a.g": "2", "tessera.b.h": "3"}
    now = {"tessera.a.f": "9", "tessera.a.g": "2", "tessera.c.i": "4"}
    change = changes.between(before, now)
    assert str(change) == "changed: tessera.a.f; new: tessera.c.i; gone: tessera.b.h"
    assert changes.code_in(changes.as_text(now, {})) == now
    assert changes.sentences({"x": change, "y": change, "z": None})[0] == f"x, y: {change}"


def test_no_init_file_imports_the_project_so_no_code_is_hidden_in_one():
    files = [
        path for folder in ("stages", "tessera", "flows", "studio") for path in (ROOT / folder).rglob("__init__.py")
    ]
    assert len(files) > 8
    for path in files:
        whole = ast.parse(path.read_text())
        # what a type checker alone reads; the public names of tessera, which nobody in the project asks for
        whole.body = [node for node in whole.body if ast.unparse(node).partition("\n")[0] != "if TYPE_CHECKING:"]
        assert not re.search(r"(import|from) +(tessera|stages|flows|studio)", ast.unparse(whole)), path


def test_no_key_of_the_params_has_a_name_that_dvc_ignores():
    def keys(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key
                yield from keys(inner)

    for path in (ROOT / "params.yaml", *(ROOT / "presets").glob("*.yaml")):
        assert not set(keys(yaml.safe_load(path.read_text()))) & set(KEYS_DVC_IGNORES), path


def test_a_metric_whose_stage_has_code_for_it_alone_makes_evaluations_stale_and_nothing_else(graph, fingerprints):
    """What trains the small priors of prior_probe counts where params name it."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["evaluate"]["metrics"]["prior-probe"] = {"kind": "prior_probe"}
    asking = fingerprints_of(ROOT, entries.read(parse(all_params.Pipeline, values), ROOT / "dvc.yaml"))
    differing = {name for name in asking if asking[name] != fingerprints[name]}
    assert {name.partition("@")[0] for name in differing} <= {
        "evaluate_tokenizer",
        "evaluate",
        "evaluate_real",
    } | ABOUT_ALL
    for needed in ("evaluation.probe.measure", "denoisers.transformer.Model", "priors.autoregressive.Model"):
        assert f"tessera.{needed}" in asking["evaluate_tokenizer@vqgan"]
        assert f"tessera.{needed}" not in fingerprints["evaluate_tokenizer@vqgan"]
