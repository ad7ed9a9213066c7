"""What mkdocs does beyond the files of docs/: pages from elsewhere in the repository, and the reference of all keys."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from megatron_rl.config.explain import explain

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "csrc/README.md", "examples/**/README.md")
"""Patterns of the pages outside docs/. Each keeps its path in the site, but for the README, which is the front page."""

INTRODUCTION = """`megatron-rl config --explain KEY` prints the same. How files, bases and overrides go together is in
[Configuration](config.md). First the keys that are in no section, then section by section."""

LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s:#]+)(#[^()\s]*)?\)")
"""A link to a file, with the text, the path and the anchor."""


def on_config(config: MkDocsConfig) -> None:
    """The examples that there are go to the end of the guides."""
    guides = next(part["How to"] for part in config.nav if "How to" in part)
    guides += [file for file in sorted(_outside()) if file.startswith("examples/")]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are not in docs/."""
    for file, uri in _outside().items():
        files.append(File.generated(config, uri, content=(ROOT / file).read_text()))
    files.append(File.generated(config, "config-reference.md", content=config_reference()))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between docs/ and the rest of the repository, as they are right in the site.

    A link to a file that the site does not have (code, a config) becomes its text; one to nothing stays, for mkdocs to
    refuse.
    """
    outside = _outside()
    sources = {uri: file for file, uri in outside.items()}
    here = page.file.src_uri
    folder = posixpath.dirname(sources.get(here, f"docs/{here}"))

    def in_site(link: re.Match[str]) -> str:
        text, path, anchor = link.group(1), link.group(2), link.group(3) or ""
        target = posixpath.normpath(posixpath.join(folder, path))
        uri = outside.get(target, target.removeprefix("docs/") if target.startswith("docs/") else "")
        if files.get_file_from_path(uri) is None:
            return text if (ROOT / target).exists() else link.group()
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor})"

    return LINK.sub(in_site, markdown)


def config_reference() -> str:
    """Every key of an experiment file, from the schema: what `megatron-rl config --explain` prints, as tables."""
    sections: dict[str, list[str]] = {"": []}
    for entry in explain().split("\n\n"):
        head, _, meaning = entry.partition("\n")
        key, _, kind = head.partition(": ")
        if meaning:
            rows = sections[key.rpartition(".")[0]]
            rows.append("| " + " | ".join(_cell(text) for text in (f"`{key}`", kind, meaning)) + " |")
        else:
            level = "##" if "." not in key else "###"
            sections[key] = [f"\n{level} `{key}`\n\n{kind}\n", "| key | type, default | meaning |", "|---|---|---|"]
    lines = [f"# Every key\n\n{INTRODUCTION}\n", "| key | type, default | meaning |", "|---|---|---|"]
    return "\n".join(line for part in (lines, *sections.values()) for line in part) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _outside() -> dict[str, str]:
    """Path in the repository -> path in the site, of the pages that are not in docs/."""
    found = [str(file.relative_to(ROOT)) for pattern in PAGES for file in ROOT.glob(pattern)]
    return {file: "index.md" if file == "README.md" else file for file in found}
