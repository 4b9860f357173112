"""The list of all settings with their meaning, and a config as commented YAML: see `train.py --list-settings`."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import yaml

from common import config as definitions
from common.config import Config, absolute_paths, flat
from dali_pipelines.errors import InputError

_WIDTH = 100  # columns


class Setting(NamedTuple):
    """One key of the config."""

    key: str
    """Such as optim.lr."""
    kind: str
    """Its type, such as "float | None"."""
    default: Any
    meaning: str
    """Its docstring in common/config.py."""


@cache
def settings() -> tuple[Setting, ...]:
    """All settings, in the order of `Config`."""
    defaults = flat(dataclasses.asdict(Config()))
    return tuple(each._replace(default=defaults[each.key]) for each in _fields("Config", ""))


def _fields(name: str, prefix: str) -> Iterator[Setting]:
    """The settings of a dataclass in common/config.py."""
    classes = _classes()
    body = classes[name].body
    for field, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        key, kind = f"{prefix}{ast.unparse(field.target)}", ast.unparse(field.annotation)
        if kind in classes:
            yield from _fields(kind, f"{key}.")
        else:
            yield Setting(key, kind, None, _text(after))


@cache
def _classes() -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(definitions))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _text(node: ast.stmt | None) -> str:
    """A string that stands alone, as one line; "" for another statement."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def list_settings(prefix: str = "") -> str:
    """The settings whose keys begin with `prefix`, with type, default and meaning. Raises `InputError` if none does."""
    found = [each for each in settings() if each.key.startswith(prefix)]
    if not found:
        sections = dict.fromkeys(each.key.partition(".")[0] for each in settings())
        raise InputError(f"no setting begins with {prefix}; expected one of {', '.join(sections)}, or the start of one")
    paragraphs = [
        f"{each.key}: {each.kind} = {_yaml(each.default)}\n" + _filled(each.meaning, "    ") for each in found
    ]
    return "\n".join(paragraphs)


def commented_yaml(config: Config) -> str:
    """The settings as YAML, each below its meaning. `load_config` reads it back."""
    values, lines, section = flat(dataclasses.asdict(absolute_paths(config))), [], ""
    for each in settings():
        before, _, name = each.key.rpartition(".")
        if before != section:
            lines.append(f"{before}:")
            section = before
        indent = "  " if section else ""
        lines.append(_filled(each.meaning, f"{indent}# "))
        lines.append(f"{indent}{name}: {_yaml(values[each.key])}")
    return "\n".join(lines) + "\n"


def _filled(text: str, start: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True).split("\n...")[0].strip()
