"""What can be held of the style by a program: columns, what docstrings owe, shapes of tensors."""

import ast
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tinytrainer_nb"
MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]
SCRIPTS = [
    *sorted((ROOT / "tests").glob("*.py")),
    *sorted((ROOT / "tools").glob("*.py")),
    *sorted((ROOT / "nbs").rglob("*.py")),
]
COLUMNS = 120


def functions(tree: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    "Public functions, and public methods of public classes, by their names"
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.append((node.name, node))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += [(f"{node.name}.{n.name}", n) for n in node.body if isinstance(n, ast.FunctionDef)]
    return [(name, node) for name, node in found if not node.name.startswith("_")]


def own_statements(node: ast.FunctionDef):
    "What stands in a function, but not in functions inside it"
    todo = list(node.body)
    while todo:
        found = todo.pop()
        yield found
        if not isinstance(found, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            todo += ast.iter_child_nodes(found)


def raises(node: ast.FunctionDef) -> bool:
    "Whether a function itself raises the error that its reader can mend"
    return any(
        isinstance(n, ast.Raise) and n.exc is not None and "TinyTrainerError" in ast.unparse(n.exc)
        for n in own_statements(node)
    )


def test_no_line_of_code_is_over_120_columns():
    long = [
        f"{p.relative_to(ROOT)}:{i}"
        for p in SCRIPTS
        for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > COLUMNS
    ]
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if cell.cell_type == "code":
                long += [
                    f"{path.relative_to(ROOT)}, cell {i}: {line[:60]}"
                    for line in cell.source.splitlines()
                    if len(line) > COLUMNS
                ]
    assert not long, f"{len(long)} lines of more than {COLUMNS} columns:\n" + "\n".join(long[:40])


def test_public_functions_that_raise_say_so():
    silent = []
    for path in MODULES:
        for name, node in functions(ast.parse(path.read_text(encoding="utf-8"))):
            if raises(node) and "raise" not in (ast.get_docstring(node) or "").lower():
                silent.append(f"{path.relative_to(PACKAGE)}: {name}")
    assert not silent, f"functions that raise TinyTrainerError and do not say so: {silent}"


def test_tensors_have_shapes():
    "The trailing comment of a parameter that is a tensor, or the line of a function, says its shape"
    bare = []
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for name, node in functions(ast.parse(source)):
            for arg in [*node.args.args, *node.args.kwonlyargs]:
                kind = ast.unparse(arg.annotation) if arg.annotation else ""
                if not re.search(r"\bTensor\b", kind) or "dict" in kind:
                    continue
                head = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno])
                if not re.search(
                    r"\([\w., /+|*-]*\)|scalar|any shape",
                    lines[arg.lineno - 1].partition("#")[2] or head.partition('"')[2],
                ):
                    bare.append(f"{path.relative_to(PACKAGE)}: {name}({arg.arg})")
    assert not bare, f"tensors without a shape: {bare}"
