"""Builds the API reference from the docstrings with pdoc, and fails on broken links or a stale docs/reference.md.

python -m docs.build output/docs

Also checks the links of README.md, CONTRIBUTING.md and docs/*.md. `ruff check` refuses public names without docstrings.
"""

import importlib
import re
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pdoc

from docs.reference import PAGE, reference

PACKAGES = (
    "dali_timesformer",
    "dali_pipelines",
    "model",
    "training",
    "evaluation",
    "serving",
    "preparation",
    "common",
    "benchmarks",
)
_PROJECT = Path(__file__).parents[1]
_EXTERNAL = re.compile(r"[a-z]+:", re.IGNORECASE)


class _Page(HTMLParser):
    """The links and the anchors of an HTML page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.anchors.add(values["id"] or "")
        if tag == "a" and values.get("href"):
            self.links.append(values["href"] or "")


def broken_links(pages: list[Path]) -> list[str]:
    """Returns a line for each relative link to a missing file or anchor."""
    parsed = {page.resolve(): _parse(page) for page in pages}
    broken = []
    for page, (links, _) in parsed.items():
        for link in links:
            if _EXTERNAL.match(link):
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (page.parent / name).resolve() if name else page
            known = parsed.get(target)
            if not target.exists() or (anchor and known is not None and anchor not in known[1]):
                broken.append(f"{page}: broken link: {link}")
    return broken


def _parse(page: Path) -> tuple[list[str], set[str]]:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".html":
        parsed = _Page(text)
        return parsed.links, parsed.anchors
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return re.findall(r"\]\(([^)\s]+)\)", text), anchors


def build(out: Path) -> list[str]:
    """Writes the pages below `out`; returns the broken links in all pages, and whether docs/reference.md is stale."""
    warnings.filterwarnings("ignore", "Error parsing type annotation")  # PyAV's classes are generic only in its stubs
    pdoc.render.configure(docformat="markdown", show_source=False, search=False)
    packages = [importlib.import_module(name) for name in PACKAGES]
    modules = [  # pdoc documents only `__all__` of a package that has it
        f"{package.__name__}.{path.stem}"
        for package in packages
        if [getattr(package, name) for name in getattr(package, "__all__", ())]
        for path in (_PROJECT / package.__name__).glob("[!_]*.py")
    ]
    pdoc.pdoc(*PACKAGES, *modules, output_directory=out)
    guides = [_PROJECT / "README.md", _PROJECT / "CONTRIBUTING.md", *sorted((_PROJECT / "docs").glob("*.md"))]
    stale = [] if PAGE.read_text(encoding="utf-8") == reference() else [f"{PAGE}: stale; run python -m docs.reference"]
    return stale + broken_links([*sorted(out.rglob("*.html")), *guides])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    broken = build(folder)
    for line in broken:
        print(line, file=sys.stderr)
    print(f"{folder}/index.html" if not broken else f"{len(broken)} broken links or stale pages")
    sys.exit(bool(broken))
