"""What DVC and its shell would see first is asked before: names that are commands, entries that cannot be hashed."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows import experiments
from flows.plan import opened, require_sane
from tessera import params as all_params
from tessera.check import __main__ as check
from tessera.components import InvalidParams
from tessera.sources.hashing import require_hashable

ROOT = Path(__file__).parents[2]
GOOD = yaml.safe_load((ROOT / "params.yaml").read_text())


def undecodable(folder: Path) -> None:
    (folder / os.fsdecode(b"a/\xff\xfe.png")).touch()


def looping(folder: Path) -> None:
    (folder / "a/l.png").symlink_to("l.png")


def dangling(folder: Path) -> None:
    (folder / ".hidden").symlink_to("/nowhere")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "a/p")


def bound(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "s"))


def link_to_a_pipe(folder: Path) -> None:
    os.mkfifo(folder.parent / "p")
    (folder / "a/l.png").symlink_to(folder.parent / "p")


ODD = {
    undecodable: r"a/\\xff\\xfe\.png has a name that is no UTF-8",
    looping: r"a/l\.png is a link to nothing, or to itself",
    dangling: r"\.hidden is a link to nothing, or to itself",
    pipe: r"a/p is no regular file but a pipe",
    bound: r"/s is no regular file but a pipe, socket",
    link_to_a_pipe: r"a/l\.png is no regular file but a pipe",
}


@pytest.fixture
def raw(tmp_path) -> Path:
    (tmp_path / "raw/a").mkdir(parents=True)
    (tmp_path / "raw/a/ü.png").touch()
    (tmp_path / "raw/a/link.png").symlink_to("ü.png")
    (tmp_path / "raw/folder").symlink_to("a")
    return tmp_path / "raw"


@pytest.mark.parametrize(("oddity", "sentence"), ODD.items(), ids=[oddity.__name__ for oddity in ODD])
def test_an_entry_at_which_dvc_would_stop_is_named_with_the_remedy(raw, oddity, sentence):
    require_hashable(raw)
    oddity(raw)
    with pytest.raises(ValueError, match=sentence + r".*: DVC hangs or stops .* take them out of .*raw$"):
        require_hashable(raw)


def test_of_many_such_entries_the_first_ones_are_named_and_of_the_source_itself_it_alone(raw):
    for number in range(7):
        (raw / f"a/{number}.png").symlink_to("/nowhere")
    with pytest.raises(
        ValueError, match=r"raw/a/0\.png is a link .*/4\.png is a link to nothing, or to itself; and 2 more: "
    ):
        require_hashable(raw)
    shutil.rmtree(raw)
    require_hashable(raw)  # whoever reads it says that it is not there
    os.mkfifo(raw)
    with pytest.raises(ValueError, match=r"^\S*raw is no regular file but a pipe"):
        require_hashable(raw)


def with_source(source: Path) -> str:
    dataset = {"kind": "image_folder", "source": str(source), "height": 8, "width": 8}
    return yaml.safe_dump({**GOOD, "dataset": dataset}, sort_keys=False)


def test_flows_and_check_refuse_such_a_folder_before_dvc_reads_it(raw, tmp_path, monkeypatch, capsys):
    pipe(raw)
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "params.yaml").write_text(with_source(raw))
    with pytest.raises(ValueError, match="a/p is no regular file"), opened([], False, None, None):
        pytest.fail("DVC was asked")
    assert check.main([]) == 2
    assert "a/p is no regular file" in capsys.readouterr().err


# Names that a shell would run. X is the file that must not appear
COMMANDS = [
    "$(touch X)",
    "`touch X`",
    ";touch X",
    "a;touch X;",
    "a\ntouch X",
    "a && touch X",
    "a | touch X",
    "$X",
    "${seed}",
]
TEMPLATES = [
    "${systems}",
    "{{ 7 * 7 }}",
    "{% for %}",
    "a'touch X'",
    'a"touch X"',
    "../X",
    "a/../X",
    "a b",
    "-a",
    "*",
    "~",
]
ATTACKS = [*COMMANDS, *TEMPLATES, "a>X", "\\$(touch X)", "a\ttouch", "A", "ü", "", "real", "a#b"]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """Params, graph and presets of the project under git."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        author = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        subprocess.run(["git", *author, *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def renamed(section: str, name: str) -> str:
    values = {**GOOD, section: {**GOOD[section], name: next(iter(GOOD[section].values()))}}
    return yaml.safe_dump(values, sort_keys=False)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_name_that_a_shell_would_run_is_refused_by_params_and_flows(checkout, attack):
    for section in ("features", "tokenizers", "systems", "edits"):
        text = renamed(section, attack)
        (checkout / "params.yaml").write_text(text)
        with pytest.raises(InvalidParams, match="no valid name"):
            all_params.read(checkout / "params.yaml")
        with pytest.raises(ValueError, match="no valid name"):
            require_sane(checkout, text)
    system = {**GOOD["systems"]["gan"], "tokenizer": attack}
    with pytest.raises(ValueError, match="no valid name"):
        require_sane(checkout, yaml.safe_dump({**GOOD, "systems": {"gan": system}}))
    assert not (checkout / "X").exists() and not (checkout.parent / "X").exists()


@pytest.mark.parametrize("attack", COMMANDS)
def test_overrides_are_text_to_flows_and_no_command(checkout, attack):
    """Whether a value is refused at once or by the first stage, nothing runs it."""
    cases = [
        (None, {"systems.gan.tokenizer": attack}),
        ("zoo", [f"+systems.{attack}.tokenizer=none"]),
        ("zoo", {"dataset.name": attack}),
        (None, [f"dataset.source='{attack}'", f"seed={attack}"]),
        (f"zoo{attack}", None),
    ]
    for preset, overrides in cases:
        try:
            experiment = experiments.define(checkout, preset, overrides)
            require_sane(checkout, experiment.params)
        except ValueError as error:
            assert len(str(error)) < 2000
        else:
            assert "systems" not in str(overrides)  # the others are no words of commands
    assert not list(checkout.rglob("X")) and not (checkout.parent / "X").exists()


def test_a_wrong_name_is_answered_before_torch_is_imported(checkout):
    (checkout / "params.yaml").write_text(renamed("systems", "Bad_Name"))
    code = (
        "import sys; from {0} import main; sys.argv = {1}; code = main({2});"
        "sys.exit('torch was imported' if 'torch' in sys.modules else code)"
    )
    for module, argv, given in (
        ("tessera.check.__main__", ["check"], "[]"),
        ("tessera.code.__main__", ["code"], "['write', '--out', 'out']"),
        ("flows.reproduce", ["reproduce"], ""),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(module, argv, given)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and "'Bad_Name' is no valid name" in done.stderr, done.stderr
