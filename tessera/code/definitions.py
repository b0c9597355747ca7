"""What code says, apart from how it is written: the definitions of this project's modules, what each uses, and their hashes.

A hash is taken of the syntax tree, without what cannot reach a result: comments, docstrings and positions; annotations of
functions and of local variables; and the wording of errors and of what a job says. What a definition uses is read from the
names in it, so that a module's other definitions do not count. A module's statements that are no definitions (loops, calls)
run when it is imported: they count with any of its definitions. Assignments at the top of a module must therefore have no
effect besides their name; tests/contract/test_fingerprints.py asks that of every module.

A key that a part gained later, `key: AddedKey[...] = None`, and what stands below `if sets(config, "key"):` count only for
params that set the key, so that nobody else trains again.

Names are resolved without regard to scopes: a local variable that is called as a function of the module counts as a use of
it. That may find one use too many, never one too few.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

DIGITS = 16
ON_IMPORT = "(on import)"  # the name of a module's statements that are no definitions
SAYING = "say"  # the method whose text reaches a person alone
CHECKING = "problems"  # the function of a part that is asked before a run, and by no stage (contracts.Planned)
ADDED, ASKING = "AddedKey", "sets"  # the annotation of an added key, and the function that asks for it (components.py)


class Use(NamedTuple):
    """A name in a definition: `name`, or `name.attribute` of a module."""

    name: str
    attribute: str | None


class Definition(NamedTuple):
    digest: str
    uses: frozenset[Use]


class Module:
    """The definitions of one source file by name, and where its imported names come from. keys: the added keys that are set."""

    def __init__(self, name: str, path: Path, keys: frozenset[str] = frozenset()):
        self.name = name
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        has_added = f"{ADDED}[" in text or f"{ASKING}(" in text
        self._body = (_OfSetKeys(keys).visit(tree) if has_added else tree).body

    @cached_property
    def imported(self) -> dict[str, list[str]]:
        """By local name, the dotted names that it may stand for. Imports inside functions count as well."""
        found: dict[str, list[str]] = {}
        for node in ast.walk(ast.Module(self._body, [])):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{self.name}: this project imports by absolute names"
                for alias in node.names:
                    found.setdefault(alias.asname or alias.name, []).append(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    local = alias.asname or alias.name.partition(".")[0]
                    found.setdefault(local, []).append(alias.name)
        return found

    @cached_property
    def definitions(self) -> dict[str, Definition]:
        statements: dict[str, list[ast.stmt]] = {}
        for node in self._body:
            for name in _names_bound_by(node):
                statements.setdefault(name, []).append(node)
        return {name: _definition(nodes) for name, nodes in statements.items()}


class _OfSetKeys(ast.NodeTransformer):
    """Takes out what belongs to added keys that are not set: their fields, and what is done for them."""

    def __init__(self, keys: frozenset[str]):
        self.keys = keys

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        annotation = node.annotation.value if isinstance(node.annotation, ast.Subscript) else None
        is_unset = _is_named(annotation, ADDED) and node.target.id not in self.keys
        return None if is_unset else node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        asked = node.test.args[-1:] if isinstance(node.test, ast.Call) and _is_named(node.test.func, ASKING) else []
        key = asked[0].value if asked and isinstance(asked[0], ast.Constant) else None
        is_unset = key is not None and key not in self.keys and not node.orelse
        return None if is_unset else self.generic_visit(node)


def _is_named(node: ast.AST | None, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _names_bound_by(node: ast.stmt) -> list[str]:
    """The definitions that a statement at the top of a module belongs to."""
    if isinstance(node, ast.Import | ast.ImportFrom) or _is_docstring(node) or _is_not_imported(node):
        return []
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [name for target in targets for name in (target.elts if isinstance(target, ast.Tuple) else [target])]
    if names and all(isinstance(name, ast.Name) for name in names):
        return [name.id for name in names]
    return [ON_IMPORT]


def _definition(nodes: list[ast.stmt]) -> Definition:
    uses: set[Use] = set()
    plain = [_plain(node, uses, wording=False) for node in nodes]
    text = json.dumps(plain, separators=(",", ":"))
    return Definition(hashlib.sha256(text.encode()).hexdigest()[:DIGITS], frozenset(uses))


def _plain(node: Any, uses: set[Use], wording: bool) -> Any:
    """A syntax tree as lists and text, equal in every version of Python that reads the code alike; its names go to `uses`.

    wording: inside what is said to a person, where text does not count, but what is computed for it does.
    """
    if isinstance(node, list):
        return [_plain(each, uses, wording) for each in node if not (wording and _is_text(each))]
    if not isinstance(node, ast.AST):
        return f"{type(node).__name__} {node!r}"
    if wording and _is_text(node):
        return "text"
    if isinstance(node, ast.Name):
        uses.add(Use(node.id, None))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        uses.add(Use(node.value.id, node.attr))
        return ["Attribute", node.value.id, node.attr]
    wording = wording or _is_said(node)
    fields = {key: value for key, value in _fields(node) if value is not None and value != []}
    return [type(node).__name__, *([key, _plain(value, uses, wording)] for key, value in sorted(fields.items()))]


def _fields(node: ast.AST) -> Iterator[tuple[str, Any]]:
    for key, value in ast.iter_fields(node):
        if key in ("ctx", "type_comment", "type_params", "kind") or _is_annotation(node, key):
            continue
        if key == "body" and isinstance(value, list):
            value = [_without_annotation(node, each) for each in value if not _is_docstring(each)]
        yield key, value


def _is_annotation(node: ast.AST, key: str) -> bool:
    return (key == "returns" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)) or (
        key == "annotation" and isinstance(node, ast.arg)
    )


def _without_annotation(parent: ast.AST, node: Any) -> Any:
    """In functions `x: int = 3` is `x = 3`; in classes annotations make fields, and count."""
    if isinstance(node, ast.AnnAssign) and not isinstance(parent, ast.ClassDef | ast.Module):
        return ast.Assign([node.target], node.value) if node.value else ast.Pass()
    return node


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_said(node: ast.AST) -> bool:
    """Whether the node only tells a person something: an error that is raised, or a line that a job says."""
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    says = is_call and isinstance(node.value.func, ast.Attribute) and node.value.func.attr == SAYING
    return isinstance(node, ast.Raise) or says


def _is_not_imported(node: ast.stmt) -> bool:
    """Whether the statement is for type checkers, or for a module that is run as a program."""
    test = ast.unparse(node.test) if isinstance(node, ast.If) else ""
    return "TYPE_CHECKING" in test or test == "__name__ == '__main__'"


class Code:
    """The modules of some packages below a folder, read when they are asked for, as they are for params that set `keys`."""

    def __init__(self, root: Path, packages: Iterable[str], keys: frozenset[str] = frozenset()):
        self.root, self.packages, self.keys = root, tuple(packages), keys
        self._modules: dict[str, Module | None] = {}
        self._of_others: dict[frozenset[str], Code] = {}

    def of_keys(self, keys: frozenset[str]) -> "Code":
        """The same code for params that set these added keys."""
        if keys == self.keys:
            return self
        return self._of_others.setdefault(keys, Code(self.root, self.packages, keys))

    def module(self, name: str) -> Module | None:
        """The module of this dotted name; None for one of another project, or a folder."""
        if name not in self._modules:
            path = self.root / f"{name.replace('.', '/')}.py"
            is_ours = name.partition(".")[0] in self.packages and path.is_file()
            self._modules[name] = Module(name, path, self.keys) if is_ours else None
        return self._modules[name]

    def reached_from(self, roots: Iterable[str]) -> dict[str, str]:
        """The digests of all definitions that the roots reach, by dotted name. A root is a definition, or a whole module
        but for what checks params before a run; where another definition uses that, it counts.

        A name that is imported from another project stands there too, as what it was imported as. Raises ValueError for a
        root that is not there.
        """
        found: dict[str, str] = {}
        waiting = list(roots)
        while waiting:
            root = waiting.pop()
            wanted = [root] if self.module(root) is None else self._all_of(root)
            for name in wanted:
                if name in found:
                    continue
                module, definition = self._definition(name)
                found[name] = definition.digest
                for use in definition.uses:
                    waiting += self._places(module, use)
                    for target in module.imported.get(use.name, ()):
                        if target.partition(".")[0] not in self.packages:
                            found[f"{module.name}.{use.name}"] = f"import {target}"
                if ON_IMPORT in module.definitions:
                    waiting.append(f"{module.name}.{ON_IMPORT}")
        return found

    def _all_of(self, name: str) -> list[str]:
        return [f"{name}.{each}" for each in self.module(name).definitions if each != CHECKING]

    def _definition(self, name: str) -> tuple[Module, Definition]:
        place, _, attribute = name.rpartition(".")
        module = self.module(place)
        if module is None or attribute not in module.definitions:
            raise ValueError(f"there is no {name} in {self.root}: expected a module or one of its definitions")
        return module, module.definitions[attribute]

    def _places(self, module: Module, use: Use) -> Iterator[str]:
        """The definitions that a name in a module may stand for."""
        if use.name in module.definitions:
            yield f"{module.name}.{use.name}"
        for target in module.imported.get(use.name, ()):
            yield from self._resolved(target, use.attribute)

    def _resolved(self, target: str, attribute: str | None) -> Iterator[str]:
        """Of a dotted name that was imported: a module (whole, unless an attribute of it is named), or a definition."""
        module = self.module(target)
        if module is not None:
            if attribute is None:
                yield target
            elif attribute in module.definitions:
                yield f"{target}.{attribute}"
            else:  # a name that the module itself has imported
                for further in module.imported.get(attribute, ()):
                    yield from self._resolved(further, None)
            return
        place, _, name = target.rpartition(".")
        above = self.module(place)
        if above is None:
            return  # another project's
        if name in above.definitions:
            yield f"{place}.{name}"
        for further in above.imported.get(name, ()):
            yield from self._resolved(further, attribute)


def digest_of(digests: dict[str, str]) -> str:
    """One hash of all of them."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
