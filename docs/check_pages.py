"""Every relative link of the Markdown pages leads to a file, every anchor to a heading, prose keeps to 120 columns, and
its sentences have 22 words on average at most: ``python docs/check_pages.py``. Tables, code blocks and lines with a URL
may be wider.
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


def sentences(page: Path) -> list[str]:
    """A page's sentences, tables and headings left out; code in a line is one word."""
    lines = [line for line in prose(page).split("\n") if not line.startswith(("|", "#", "    "))]
    text = re.sub(r"^ *([-*]|\d+\.) ", "\n\n", "\n".join(lines), flags=re.MULTILINE)
    words = re.sub(r"`[^`]*`|<[^>]*>", "X", LINK.sub("X", text))
    parts = [part for paragraph in words.split("\n\n") for part in re.split(r"(?<=[.!?:])\s+(?=[A-Z(*])", paragraph)]
    return [part for part in parts if len(part.split()) > 2]


def long_sentences(page: Path) -> list[str]:
    """A page whose sentences are long on average."""
    lengths = [len(sentence.split()) for sentence in sentences(page)]
    average = sum(lengths) / max(1, len(lengths))
    return [f"{page.relative_to(ROOT)}: {average:.1f} words a sentence, 22 at most"] if average > 22 else []


def main() -> None:
    """Print what is wrong and exit with 1, or print how many pages are right."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*.md")]
    wrong = [fault for page in pages for fault in (*faults(page), *wide_lines(page), *long_sentences(page))]
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"{len(pages)} pages, every link leads somewhere, no prose over 120 columns")


if __name__ == "__main__":
    main()
