"""Writes docs/api.md from the docstrings, read as text (nothing is imported): ``python docs/make_api.py [--check]``.

With ``--check`` it writes nothing and exits with 1 where api.md is not what the docstrings say now;
``make lint`` runs it.
"""

import argparse
import ast
import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
HEAD = """# Interface

Made from the docstrings by `python docs/make_api.py`: change those, not this page. First the public names of
`dreamlip_kernels`, each in full; then a line for every module of both packages.
"""


def exported(package: Path) -> dict[str, Path]:
    """The names in a package's ``__all__``, with the file that defines each."""
    tree = ast.parse((package / "__init__.py").read_text())
    sources = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = package.joinpath(*node.module.split("."))
            file = module.with_suffix(".py")
            sources |= {alias.name: file if file.exists() else module / "__init__.py" for alias in node.names}
    names = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    return {name: sources[name] for name in ast.literal_eval(names) if not name.startswith("__")}


def definition(name: str, file: Path) -> ast.AST:
    """The function or class ``name`` of ``file``, followed through packages that only hand it on."""
    tree = ast.parse(file.read_text())
    overloaded = [node for node in tree.body if getattr(node, "name", None) == name]
    if overloaded:
        return overloaded[-1]  # the implementation comes after its overloads
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            module = file.parent.joinpath(*[".."] * (node.level - 1), *(node.module or "").split(".")).resolve()
            return definition(name, next(p for p in (module.with_suffix(".py"), module / "__init__.py") if p.exists()))
    raise SystemExit(f"make_api: {name} is in __all__ and not in {file.relative_to(ROOT)}")


def signature(node: ast.AST) -> str:
    """``name(arguments) -> result``; of a class, its constructor's."""
    if isinstance(node, ast.ClassDef):
        inits = [child for child in node.body if getattr(child, "name", None) == "__init__"]
        if not inits:
            return f"class {node.name}"
        inits[-1].args.args = inits[-1].args.args[1:]  # without self
        one_line = f"class {node.name}({ast.unparse(inits[-1].args)})"
    else:
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        one_line = f"{node.name}({ast.unparse(node.args)}){result}"
    if len(one_line) <= 110:
        return one_line
    head, _, rest = one_line.partition("(")
    inside, _, tail = rest.rpartition(")")
    return f"{head}(\n    {_lines(inside)}\n){tail}"


def _lines(arguments: str) -> str:
    """One argument a line: commas within brackets and strings do not count."""
    depth, lines, line = 0, [], ""
    for character in arguments:
        depth += (character in "[({") - (character in "])}")
        line += character
        if character == "," and depth == 0:
            lines.append(line.strip())
            line = ""
    return "\n    ".join([*lines, line.strip() + ","])


def public_part(package: Path) -> str:
    """Every public name, with its signature and whole docstring."""
    parts = [f"\n## {package.name}\n"]
    for name, file in exported(package).items():
        node = definition(name, file)
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        parts.append(f"\n### `{name}`\n\n```text\n{signature(node)}\n\n{text}\n```\n")
    return "".join(parts)


def module_part(package: Path) -> str:
    """The first sentence of every module's docstring, a table for each folder."""
    parts = [f"\n## Modules of {package.name}\n"]
    for folder in sorted({file.parent for file in package.rglob("*.py")}):
        name = ".".join(folder.relative_to(ROOT).parts)
        contract = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        parts.append(f"\n### {name}\n\n{contract}\n\n| module | |\n|---|---|\n")
        for file in sorted(folder.glob("*.py")):
            if file.name != "__init__.py":
                text = ast.get_docstring(ast.parse(file.read_text())) or ""
                first = " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
                parts.append(f"| [{file.stem}](../{file.relative_to(ROOT)}) | {first} |\n")
    return "".join(parts)


def main() -> None:
    """Write the page, or say that it is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where api.md is stale")
    options = parser.parse_args()
    packages = [ROOT / "dreamlip_kernels", ROOT / "dreamlip_train"]
    text = HEAD + public_part(packages[0]) + "".join(module_part(package) for package in packages)
    if not options.check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit("docs/api.md is not what the docstrings say: python docs/make_api.py")


if __name__ == "__main__":
    main()
