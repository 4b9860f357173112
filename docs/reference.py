"""Writes docs/reference.md: every setting, and every option of every command, from the code.

python -m docs.reference
"""

import argparse
import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from common.settings import settings

PAGE = Path(__file__).parent / "reference.md"
_COMMANDS = ("train", "evaluate", "predict", "export", "prepare", "weights", "benchmark")


def reference() -> str:
    """The page, in Markdown."""
    lines = [
        "# Reference: settings and commands",
        "",
        "Generated from the code by `python -m docs.reference`. `make docs` builds the API reference of all packages,",
        "in `output/docs`.",
        "",
        "## Settings",
        "",
        "Set them in a YAML file (`-c`) or on the command line (`-o optim.lr=0.001`), which wins. `train.py -c FILE",
        "--print-config` prints the result with these explanations. A relative path in a file starts at that file's",
        "folder, a typed one at the current folder.",
    ]
    section = None
    for each in settings():
        before, _, _ = each.key.rpartition(".")
        if before != section:
            section = before
            lines += ["", f"### `{section}`" if section else "### The run", ""]
            lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        default = yaml.safe_dump(each.default, default_flow_style=True).split("\n")[0]
        lines.append(f"| `{each.key}` | {_cell(each.kind)} | `{default}` | {_cell(each.meaning)} |")
    lines += ["", "## Commands"]
    for name in _COMMANDS:
        lines += ["", f"### {name}.py", ""]
        lines += _options(_parser(name))
    return "\n".join(lines) + "\n"


def _parser(name: str) -> argparse.ArgumentParser:
    """The argument parser of a command."""
    found: list[argparse.ArgumentParser] = []
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *arguments: Any) -> Any:
        if arguments:  # not those of the command line
            return parse_args(parser, *arguments)
        found.append(parser)
        raise SystemExit

    command = importlib.import_module(f"commands.{name}")
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), contextlib.suppress(SystemExit):
        command.main()
    return found[0]


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    if parser.description:
        yield from (parser.description, "")
    rows, verbs, about = [], {}, {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            verbs = action.choices
            about = {each.dest: each.help for each in action._get_subactions()}
        elif action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            meaning = (action.help or "") % (vars(action) | {"prog": parser.prog})
            rows.append(f"| `{_cell(_usage(action))}` | {_cell(meaning)} |")
    if rows:
        yield from ("| option | |", "| --- | --- |", *rows)
    for verb, verb_parser in verbs.items():
        yield from ("", f"#### {verb}", "", f"{about[verb][:1].upper()}{about[verb][1:]}.", "")
        yield from _options(verb_parser)


def _usage(action: argparse.Action) -> str:
    value = action.metavar or (action.choices and "|".join(map(str, action.choices))) or action.dest.upper()
    value = " ".join(value) if isinstance(value, tuple) else str(value)
    if action.nargs in ("+", "*"):
        value += " ..."
    if not action.option_strings:
        return value
    return ", ".join(action.option_strings) + (f" {value}" if action.nargs != 0 else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(PAGE)
