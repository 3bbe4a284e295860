"""The pages name only what there is: commands, options, links, messages.

That all of it also runs: test_docs_followed.py.
"""

import itertools
import re
import tomllib
from pathlib import Path

import pytest
from pages import FOREIGN, PAGES, ROOT, blocks, parse, understand, write_options


PROSE = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "space/README.md", ROOT / "train/README.md"]
)
COMMANDS = [
    pytest.param(page, words, id=f"{page.name}:{line}")
    for page in PAGES
    for block in blocks(page)
    if block.language == "sh"
    for line, words in block.commands
]


def check_pip(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\[(.+?)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    for flag, value in itertools.pairwise(arguments):
        assert flag != "-r" or (ROOT / value).is_file()


@pytest.mark.parametrize(("page", "words"), COMMANDS)
def test_a_command_names_only_what_there_is(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_options(page)
    program, arguments = understand(words)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program == "pip":
        check_pip(arguments)
    elif program not in FOREIGN:
        parse(program, arguments, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "minim generate --no-such-option 1",
        "python train/train_encoder.py --train_data a --output_dir b --no_such_option",
        "accelerate launch --no_such_option train/train_encoder.py",
        "minim draw",
    ],
)
def test_an_option_that_does_not_exist_is_found(command, monkeypatch):
    with pytest.raises((AssertionError, SystemExit)):
        parse(*understand(command.split()), monkeypatch)


def anchors(page: Path) -> set[str]:
    """The names of a page's headings as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        place = page.parent / name if name else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert not broken


def test_scripts_and_modules_that_are_named_lie_there():
    """Also in the card and its template; the diary names what there was."""
    named = re.compile(
        r"(?<![\w/])(?:train|research|runs|space|bench|minim_pipeline|tests)/[\w/.-]+\.(?:py|sh|jinja)\b"
    )
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("research/*.jinja")]
    pages = [page for page in pages if page.name not in ("EXPERIMENTS.md", "CHANGELOG.md")]
    missing = {
        f"{page.name}: {name}"
        for page in pages
        for name in named.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / name).is_file() and "SCRIPT" not in name
    }
    assert len(pages) > 10 and not missing


def test_messages_of_troubleshooting_are_those_of_the_code():
    code = "\n".join(
        path.read_text()
        for folder in ("minim_pipeline", "train", "research")
        for path in (ROOT / folder).rglob("*.py")
    )
    code = re.sub(r"[\"']\s*\n\s*f?[\"']", "", code + (ROOT / "Makefile").read_text())
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    parts = [part.strip() for row in rows for quoted in re.findall(r"`(.+?)`", row) for part in quoted.split("…")]
    assert [part for part in parts if part not in code] == []


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 75


def test_the_version_is_the_same_everywhere():
    from minim_pipeline import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {__version__} - " in (ROOT / "CHANGELOG.md").read_text()
