"""What a user reads: the panels of the help."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import kitseg


def test_the_help_shows_the_commands_in_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = kitseg(tmp_path, "--help").text.splitlines()
    starts = [re.match(r"╭─ (\w+) ─|│ ([a-z]\S*)", line) for line in lines]
    found = [match[1] or match[2] for match in starts if match]
    assert " ".join(found) == (
        "Options Data download phantom synthesize check split preprocess augment fit-priors Training plan train "
        "validate compare choose Prediction predict infer ensemble postprocess grand-challenge Results evaluate "
        "measure followup report refine mesh submit Sharing export serve About methods demo"
    )


@pytest.mark.parametrize("command", ["train", "predict", "report"])
def test_options_show_no_types_of_python(tmp_path: Path, command: str) -> None:
    text = kitseg(tmp_path, command, "--help").text
    assert [line for line in re.findall(r"│ --(\S+).*<(?:bool|list)", text) if line != "help"] == []


@pytest.mark.parametrize("command", ["split", "predict"])
def test_the_paragraphs_of_a_command_fill_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """In a paragraph, no line ends where the next word would still fit."""
    monkeypatch.setenv("COLUMNS", "60")
    text = kitseg(tmp_path, command, "--help").text.partition("╭")[0].partition("Usage")[2]
    for paragraph in re.split(r"\n\s*\n", text)[1:]:
        lines = [line.rstrip() for line in paragraph.strip("\n").splitlines()]
        for line, following in pairwise(lines):
            assert len(line) + 1 + len(following.split()[0]) > 58, line


#: Words and turns of phrase that are not plain technical English, and what stands for them:
#: states or reports, resumes, is not, fix, predicts, problem.
COLLOQUIAL = re.compile(
    r"\b(told|tells?|said|says|heard|goes on|go on|mend(s|ed|ing)?|belie(f|ve[sd]?)|befell|befalls?|sights?|obey(s|ed)?"
    r"|is no number|no number any more|what became of|in words)\b",
    re.IGNORECASE,
)
ROOT = Path(__file__).parents[1]
TEXTS = ("kitseg/**/*.py", "kitseg/**/*.j2", "conf/**/*.yaml", "docs/**/*.md", "*.md")


def test_the_words_are_plain_technical_english() -> None:
    files = [file.relative_to(ROOT) for pattern in TEXTS for file in sorted(ROOT.glob(pattern))]
    found = [
        f"{file}:{number}: {match[0]}"
        for file in files
        for number, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1)
        if (match := COLLOQUIAL.search(line))
    ]
    assert len(files) > 200
    assert found == []
