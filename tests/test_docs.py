"""What README and docs say of the repository is true: links, paths, metrics, keys and the rooms of the packages."""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from megatron_rl.config.load import all_keys, section_type
from megatron_rl.config.schema import Config
from tests.launching import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "csrc/README.md", *(ROOT / "examples").rglob("*.md")]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
WITH_OTHER_KEYS = ("CHANGELOG.md", "docs/from-other-frameworks.md")
"""Pages that name keys of old versions or of others; the latter has a test of its own in `tests/examples/`."""
FOLDERS = "megatron_rl|rollout|drafter|csrc|configs|launch|docs|benchmarks|tests|examples"

SUFFIXES = (".py", ".json", ".safetensors", ".yaml")
"""Of files whose names begin like keys."""

LINK = re.compile(r"\[[^\[\]]*\]\(([^()\s:#]*)(?:#([^()\s]*))?\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(rf"(?<![\w./-])((?:{FOLDERS})/[\w./*-]*[\w*/])")
METRIC = re.compile(r"[a-z_]+(?:/[\w<>{}]+)+")


def _text(name: str) -> str:
    return (ROOT / name).read_text()


def _anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _inline_code(name: str) -> Iterator[str]:
    yield from CODE.findall(re.sub(r"^```.*?^```", "", _text(name), flags=re.M | re.S))


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings_that_exist(name: str) -> None:
    broken = []
    for path, anchor in LINK.findall(_text(name)):
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        if not target.exists():
            broken.append(path)
        elif anchor and anchor not in _anchors(target.read_text()):
            broken.append(f"{path}#{anchor}")
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_paths_of_the_repository_exist(name: str) -> None:
    # Without a suffix or a slash at the end it may be a metric: `drafter/live_*`.
    found = {path for path in PATH.findall(_text(name)) if "." in path.rpartition("/")[2] or path.endswith("/")}
    missing = [
        path
        for path in sorted(found)
        if not path.endswith(".so")  # built, where there is a compiler for it
        and "NAME" not in path
        and not any(ROOT.glob(path))
    ]
    assert missing == []


def test_paths_are_looked_for_and_found() -> None:
    assert PATH.findall("see `rollout/types.py`, csrc/*.h and (docs/plan.md)") == [
        "rollout/types.py",
        "csrc/*.h",
        "docs/plan.md",
    ]
    assert sum(len(PATH.findall(_text(name))) for name in NAMES) > 100


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_OTHER_KEYS])
def test_keys_in_backticks_are_in_the_schema(name: str) -> None:
    sections = [key for key, field in Config.model_fields.items() if section_type(field.annotation)]
    quoted = re.compile(rf"({'|'.join(sections)})((?:\.[a-z_0-9]+)+)(?:[= :].*)?")
    unknown = []
    for code in _inline_code(name):
        match = quoted.fullmatch(code)
        if match and not code.endswith(SUFFIXES) and not _is_key(match.group(1) + match.group(2)):
            unknown.append(code)
    assert unknown == []


def _is_key(name: str) -> bool:
    """Also what is below a key that takes a library's own options, and modules, whose packages share names."""
    keys, free = set(all_keys()), ("model.megatron.", "rollout.vllm.", "rollout.sampling.", "algorithm.options.")
    module = ROOT / name.replace(".", "/")
    return name in keys or name.startswith(free) or module.is_dir() or module.with_suffix(".py").exists()


def _documented_metrics() -> list[str]:
    """First column of the table, written out: `response/length_p5`, `_p25` are two names."""
    names: list[str] = []
    for row in re.findall(r"^\| (`.+?) \|", _text("docs/metrics.md"), flags=re.M):
        for name in CODE.findall(row):
            short = name.startswith("_")
            names.append(names[-1].rpartition("_")[0] + name if short else name)
    return names


def _pattern(name: str) -> re.Pattern[str]:
    """A name with parts that vary, in <> or {}, as an expression that both spellings match."""
    return re.compile(
        "".join(".+" if part[0] in "<{" else re.escape(part) for part in re.findall(r"[<{].*?[>}]|[^<{]+", name))
    )


@cache
def _measured() -> frozenset[str]:
    """Strings of the trainer that look like metrics of a documented family; what an f-string inserts is {}."""
    families = {name.partition("/")[0] for name in _documented_metrics()}
    found = set()
    for file in sorted((ROOT / "megatron_rl").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        inner = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes:
            if node in inner:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values]
                name = "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value
            else:
                continue
            if METRIC.fullmatch(name) and name.partition("/")[0] in families:
                found.add(name)
    return frozenset(found)


def test_every_documented_metric_is_measured() -> None:
    assert len(_documented_metrics()) > 120
    source = "\n".join(file.read_text() for file in sorted((ROOT / "megatron_rl").rglob("*.py")))

    def is_measured(name: str) -> bool:
        last = name.rpartition("/")[2]
        matching = [measured for measured in _measured() if _pattern(measured).fullmatch(name)]
        # Where an f-string inserts all of the last part, that stands somewhere else.
        stands = last == "x" or re.search(rf"\b{last}\b", source) is not None
        return any(stands or not measured.endswith("/{}") for measured in matching)

    plain = [re.sub(r"<.*?>", "x", name) for name in _documented_metrics()]
    assert [name for name in plain if not is_measured(name)] == []


def test_every_measured_metric_is_documented() -> None:
    assert len(_measured()) > 80
    documented = _documented_metrics()
    missing = [
        name
        for name in sorted(_measured())
        if not any(_pattern(other).fullmatch(name) or _pattern(name).fullmatch(other) for other in documented)
    ]
    assert missing == []


@pytest.mark.parametrize("package", ["megatron_rl", "rollout", "drafter"])
def test_architecture_lists_the_rooms_of_each_package(package: str) -> None:
    text = _text("docs/architecture.md")
    part = re.search(rf"^`{package}/`,.*?(?=^`\w+/`|^## )", text, flags=re.M | re.S)
    assert part is not None
    rooms = {folder.parent.name for folder in (ROOT / package).glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/` \|", part.group(), flags=re.M)) == rooms
