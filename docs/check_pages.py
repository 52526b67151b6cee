"""Every relative link of the Markdown pages leads to a file, every anchor to a heading, and prose keeps to 120 columns:
``python docs/check_pages.py``. Tables, code blocks and lines with a URL may be wider.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts make it."""
    text = re.sub(r"[`*_]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings."""
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)}


def faults(page: Path) -> list[str]:
    """What is wrong with a page's links."""
    wrong = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists():
            wrong.append(f"{page.relative_to(ROOT)}: {link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            wrong.append(f"{page.relative_to(ROOT)}: {link}: no such heading")
    return wrong


def wide_lines(page: Path) -> list[str]:
    """The lines of prose over 120 columns."""
    return [
        f"{page.relative_to(ROOT)}: {len(line)} columns: {line[:60]}.."
        for line in prose(page).split("\n")
        if len(line) > 120 and not line.startswith("|") and "://" not in line
    ]


def main() -> None:
    """Print what is wrong and exit with 1, or print how many pages are right."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*.md")]
    wrong = [fault for page in pages for fault in (*faults(page), *wide_lines(page))]
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"{len(pages)} pages, every link leads somewhere, no prose over 120 columns")


if __name__ == "__main__":
    main()
