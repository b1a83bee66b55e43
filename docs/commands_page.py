"""Writes ``reference/commands.md``, the reference of all commands, from the command line itself: ``nox -s docs``."""

from __future__ import annotations

from pathlib import Path

import typer

from kitseg.cli import app

PAGE = Path(__file__).parent / "reference" / "commands.md"


def commands_page() -> str:
    """All commands with their arguments and options as Markdown, grouped as in ``kitseg --help``."""
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="kitseg")
    lines, panel = ["# Commands", "", "Generated from the help of each command.", ""], None
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command.rich_help_panel != panel:
            panel = command.rich_help_panel
            lines += [f"## {panel}", ""]
        lines += _command(command, typer.Context(command, info_name=name, parent=context))
    return "\n".join(lines)


def _command(command: typer.core.TyperCommand, context: typer.Context) -> list[str]:
    rows = [record for parameter in command.get_params(context) if (record := parameter.get_help_record(context))]
    return [
        *(f"### kitseg {context.info_name}", "", command.help or "", ""),
        *("```text", f"{context.command_path} {' '.join(command.collect_usage_pieces(context))}", "```", ""),
        *("| argument or option | meaning |", "|---|---|"),
        *(f"| `{_cell(names)}` | {_cell(text).replace('<', '&lt;')} |" for names, text in rows),
        "",
        *(["```sh", command.epilog.removeprefix("Example: "), "```", ""] if command.epilog else []),
    ]


def _cell(text: str | None) -> str:
    return (text or "").replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(commands_page(), encoding="utf-8")
