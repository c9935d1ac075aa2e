"""Write docs/api.md from the signatures and docstrings of the package and the first lines of the tools.

What is in it: the public names of the modules in SECTIONS, everything in them that a config can name in ``type=``, and
the scripts of tools/. --check writes nothing and exits with status 1 if the page differs.
"""

import argparse
import ast
import importlib
import inspect
import json
import pkgutil
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import mmengine.registry
from mmengine.registry import Registry

import grootvl_mm

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
TOOLS = ("tools", "demo")
LINE = 100  # characters of a signature
INTRODUCTION = """\
# API reference

Written by `.dev_scripts/make_api_docs.py` from the docstrings; change those, not this page.
Shapes: B batch, C or D channels, H x W positions, L = H * W vertices in row-major order, E edges.
"""


class Section(NamedTuple):
    """A part of the page: the public names of some modules."""

    title: str
    modules: tuple[str, ...]


SECTIONS = (
    Section("Operators", ("grootvl_mm.ops",)),
    Section("Models", ("grootvl_mm.models",)),
    Section("Training", ("grootvl_mm.engine",)),
    Section("Model names", ("grootvl_mm.apis.zoo",)),
)


def make_page() -> str:
    """The whole page."""
    for module in pkgutil.walk_packages(grootvl_mm.__path__, "grootvl_mm."):
        if module.name.rpartition(".")[2] != "_C":
            importlib.import_module(module.name)
    sections = {section: find_members(section) for section in SECTIONS}
    names = {name for members in sections.values() for name in members}
    parts = [INTRODUCTION]
    for section, members in sections.items():
        parts.append(f"## {section.title}\n")
        for module in section.modules:
            parts.append(to_markdown(inspect.getdoc(importlib.import_module(module)), names))
        parts.append("".join(f"- [`{name}`](#{anchor(name)})\n" for name in members))
        parts += [describe(name, member, names) for name, member in members.items()]
    parts.append("## Tools\n\nEach says more with `--help`.\n")
    parts.append("".join(f"- [`{path}`](../{path}): {_inline(line, names)}\n" for path, line in find_tools()))
    return "\n".join(parts)


def find_members(section: Section) -> dict[str, Any]:
    """The public names of the section's modules, and what configs can name in them, functions first."""
    members = {}
    for name in section.modules:
        module = importlib.import_module(name)
        members |= {member: getattr(module, member) for member in _public_names(module)}
    for registry in vars(mmengine.registry).values():
        if isinstance(registry, Registry):
            for scope in (registry, *registry.children.values()):
                registered = scope.module_dict.values()
                members |= {cls.__name__: cls for cls in registered if cls.__module__.startswith(section.modules)}
    return dict(sorted(members.items(), key=lambda item: (inspect.isclass(item[1]), item[0])))


def _public_names(module: ModuleType) -> list[str]:
    """What the module exports, or else the functions and classes that it defines."""
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return getattr(module, "__all__", [name for name in defined if not name.startswith("_")])


def find_tools() -> Iterator[tuple[str, str]]:
    """Path and first line of every script."""
    for path in sorted(path for folder in TOOLS for path in (ROOT / folder).rglob("*.*")):
        text = path.read_text(encoding="utf-8") if path.suffix in (".py", ".sh") else ""
        if path.suffix == ".py" and '__name__ == "__main__"' in text:
            yield path.relative_to(ROOT).as_posix(), ast.get_docstring(ast.parse(text)).splitlines()[0]
        elif path.suffix == ".sh":
            yield path.relative_to(ROOT).as_posix(), text.splitlines()[1].removeprefix("# ")


def describe(name: str, member: Any, names: Iterable[str], owner: str = "") -> str:
    """The Markdown of a function, a class or a method (``owner``: its class)."""
    level = "####" if owner else "###"
    parts = [f"{level} `{owner}{name}`\n", f"```python\n{signature(f'{owner}{name}', member)}\n```\n"]
    parts.append(to_markdown(inspect.getdoc(member), names))
    if inspect.isclass(member):
        parts += [describe(method, vars(member)[method], names, f"{name}.") for method in own_methods(member)]
    return "\n".join(parts)


def own_methods(cls: type) -> list[str]:
    """The public methods of a class that a user calls: ``forward``, and what its bases do not have."""
    inherited = {name for base in cls.__mro__[1:] for name in vars(base)} - {"forward"}
    methods = {name for name, value in vars(cls).items() if inspect.isfunction(value) and not name.startswith("_")}
    return sorted(methods - inherited)


def signature(name: str, member: Any) -> str:
    """``name(argument: type = default, ...) -> type``, on several lines if it is long.

    A class whose arguments are those of a base outside the package is shown by its base.
    """
    if inspect.isclass(member) and not any(
        "__init__" in vars(cls) or "__new__" in vars(cls)
        for cls in member.__mro__
        if cls.__module__.startswith("grootvl_mm")
    ):
        return f"class {name}({member.__base__.__name__})"
    found = inspect.signature(member)
    parameters, keyword_only = [], False
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parameters.append("*")
            keyword_only = True
        parameters.append(_parameter(parameter))
    result = "" if found.return_annotation in (found.empty, None) else f" -> {_annotation(found.return_annotation)}"
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= LINE:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){result}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        default = json.dumps(parameter.default) if isinstance(parameter.default, str) else repr(parameter.default)
        text += f" = {default}" if ":" in text else f"={default}"
    return text


def _annotation(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)


def to_markdown(docstring: str, names: Iterable[str]) -> str:
    """A docstring in Google's style as Markdown; a paragraph is one line."""
    parts = []
    for title, lines in _sections(docstring.splitlines()):
        if not title:
            parts.append(_text(lines, names))
        elif title in ("Args", "Attributes", "Raises"):
            items = re.findall(r"^(\w[\w., ]*?): (.+?)(?=^\w[\w., ]*?: |\Z)", _dedent(lines), re.MULTILINE | re.DOTALL)
            listed = [f"- {_names_in_code(item)}: {_inline(' '.join(text.split()), names)}\n" for item, text in items]
            heading = {"Args": "Arguments"}.get(title, title)
            parts.append(f"**{heading}**\n\n" + "".join(listed))
        else:
            parts.append(f"**{title}**\n\n" + _text(_dedent(lines).splitlines(), names))
    return "\n".join(parts)


def _sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Titles and lines of a docstring's sections; the title of plain text is empty."""
    title, block = "", []
    for line in lines:
        found = re.fullmatch(r"(Args|Attributes|Raises|Returns|Yields):", line)
        ends = title and line and not line.startswith(" ")
        if found or ends:
            if any(block):
                yield title, block
            title, block = (found[1], []) if found else ("", [line])
        else:
            block.append(line)
    if any(block):
        yield title, block


def _dedent(lines: list[str]) -> str:
    return "\n".join(line[4:] if line.startswith("    ") else line for line in lines).strip("\n")


def _text(lines: list[str], names: Iterable[str]) -> str:
    """Paragraphs, lists ("- ") and code (indented, after "::")."""
    parts = []
    for paragraph in re.split(r"\n\s*\n(?!    )", "\n".join(lines).strip("\n")):
        if paragraph.startswith("    "):
            parts.append(f"```python\n{inspect.cleandoc(paragraph)}\n```\n")
            continue
        head, _, code = paragraph.partition("::\n\n")
        items = re.split(r"\n(?=- )", head)
        joined = "\n".join(_inline(" ".join(item.split()), names) for item in items)
        parts.append(joined + (":\n" if code else "\n"))
        if code:
            parts.append(f"```python\n{inspect.cleandoc(code)}\n```\n")
    return "\n".join(parts)


def _names_in_code(item: str) -> str:
    return ", ".join(f"`{name.strip()}`" for name in item.split(","))


def _inline(text: str, names: Iterable[str]) -> str:
    """Roles of Sphinx and double backquotes as Markdown; what stands outside of them keeps its characters."""

    def replace(match: re.Match) -> str:
        if match[2] is not None:
            return f"`{match[2]}`"
        name = match[1].lstrip("~").rpartition(".")[2]
        return f"[`{name}`](#{anchor(name)})" if name in names else f"`{name}`"

    parts = re.split(r"(:\w+:`[^`]+`|``.+?``)", text)
    pattern = re.compile(r":\w+:`([^`]+)`|``(.+?)``")
    return "".join(pattern.sub(replace, part) if index % 2 else escape(part) for index, part in enumerate(parts))


def escape(text: str) -> str:
    """Plain text that Markdown would not take for emphasis or a tag."""
    return re.sub(r"(\*(?=\S)|(?<=\S)\*|<(?=[a-zA-Z/!]))", r"\\\1", text)


def anchor(name: str) -> str:
    """The anchor that GitHub makes of a heading with this name."""
    return re.sub(r"[^\w-]", "", name.lower())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # deprecations inside mmengine
    page = make_page()
    if not args.check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        raise SystemExit("docs/api.md differs from the docstrings; run .dev_scripts/make_api_docs.py")


if __name__ == "__main__":
    main()
