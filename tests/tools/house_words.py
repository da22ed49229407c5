"""Find words of a private language where the field has its own: names, comments, strings, pages.

Run ``python -m tests.tools.house_words [FILE ...]``. It prints ``file:line: word: use instead`` for
every word in the library, the documentation and the front pages, and exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")


@dataclass(frozen=True)
class Word:
    """A word to avoid.

    Attributes
    ----------
    pattern : str
        A regular expression for the whole word or words.
    instead : str
        What to write.
    names, prose, pages : bool
        Whether to look for it in identifiers, in comments and strings, and in the documentation.
        Many are common words that are private in a name only, or when they tell what code does.
    """

    pattern: str
    instead: str
    names: bool = True
    prose: bool = True
    pages: bool = True


WORDS = [
    Word("walks?|walked|walking|walkers?", "backward pass"),
    Word("ends", "endpoints"),
    Word("abreast|side by side", "batched"),
    Word("places?", "position, slot, hook point"),
    Word("asking|who is asking", "request, calling library"),
    Word("questions?|asked", "request", prose=False),
    Word("trunks?", "prefix"),
    Word("head", "suffix", prose=False),  # in prose mostly the layers on top of a network
    Word("whole numbers?", "integers"),
    Word("everywhere", "dense", pages=False),
    Word("packed", "masked"),
    Word("require|refuse", "check", prose=False),
    Word("widen|widens|widened|widening", "promote to float64"),
    Word("says|knows|minds|lets", "returns, records, rejects, permits", pages=False),
    Word("(?:say|tell|says|tells) whether", "Return True if"),
    Word("owed|owes", "required change"),
    Word("kept", "cached", prose=False),
    Word("(?:take|takes|taken|took) (?:\\w+ )?apart", "decompose"),
    Word("twins?", "relaxation"),
    Word("turns", "locks", prose=False),
    Word("narrow", "low precision", prose=False),
    Word("narrow(?:er)? (?:floating-point )?types?", "low precision"),
    Word("lean", "frozen"),
    Word("found", "the name of the thing", prose=False),  # in prose the participle of find
    Word("beside", "compared with, next to"),
    Word("alone", "only"),
    Word("anew", "again"),
    # "for" in the sense of "because" cannot be told from the preposition, nor "else" from the one
    # of a formula by cases.
    Word("letters", "terms", pages=False),
    Word("by chance", "random, at random"),
]

#: Names that have a word in a sense of its own, each with the reason.
ALLOWED_NAMES = {
    r"(?:\w+_)?packed(?:_\w+)?": "packed sequences of torch",
    r"\w*in_?place\w*": "what torch calls an operator that writes into its argument",
    r"\w+NotFound(?:Error)?": "exceptions of other libraries",
}
#: Attributes, after a dot.
ALLOWED_ATTRIBUTES = {
    "walk": "ast.walk and os.walk",
    "narrow": "an operator of torch",
    "head": "the last layer of a network",
}
#: Texts that have a word in a sense of its own.
ALLOWED_PROSE = {
    r"ast\.walk|os\.walk": "functions of the standard library",
    r"in-place|in place|in one place": "of operators that write into their argument, and idioms",
    r"tak(?:e|es|ing) (?:place|(?:\S+ ){1,3}?place)|last places?|decimal places?": "idioms",
    r"ends (?:with|there|at)": "the verb",
    r"everywhere and|defined everywhere": "at every point of a function's domain",
    r"packed (?:sequences?|series|quantized)": "kinds of tensors in torch",
    r"torch says|fxshap \{\w+\} knows": "in messages, of programs",
    r"twins(?:_\w+)?(?=\s+\|)": "networks of timm",
    r"walked, ran|\"Walking\"": "what people do",
}


@dataclass(frozen=True)
class Finding:
    """A word at its line."""

    path: Path
    line: int
    text: str
    word: Word

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}: {self.word.instead}"


def is_code(path: Path) -> bool:
    """Return True for a file of the library, False for one of the documentation."""
    return path.suffix == ".py" and "docs" not in path.parts


def parts_of(name: str) -> list[str]:
    """Split an identifier at underscores and in camel case, in lower case."""
    pieces = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return [piece.lower() for piece in pieces]


def in_name(path: Path, line: int, name: str) -> Iterator[Finding]:
    """Yield the words in an identifier."""
    if any(re.fullmatch(allowed, name) for allowed in ALLOWED_NAMES):
        return
    parts = parts_of(name)
    for word in WORDS:
        if (
            word.names
            and (word.pages or is_code(path))
            and any(re.fullmatch(word.pattern, part) for part in parts)
        ):
            yield Finding(path, line, name, word)


def in_prose(path: Path, line: int, text: str) -> Iterator[Finding]:
    """Yield the words in a text that begins at a line."""
    for allowed in ALLOWED_PROSE:
        pattern = rf"(?<!\w)(?:{allowed})(?!\w)".replace(" ", r"[\s#]+")
        text = re.sub(pattern, lambda match: "\n" * match[0].count("\n"), text, flags=re.IGNORECASE)
    for word in WORDS:
        if word.prose and (word.pages or is_code(path)):
            spaced = rf"\b(?:{word.pattern})\b".replace(" ", r"[\s#]+")
            for match in re.finditer(spaced, text, re.IGNORECASE):
                at = line + text.count("\n", 0, match.start())
                yield Finding(path, at, " ".join(match[0].split()), word)


def in_python(path: Path) -> Iterator[Finding]:
    """Yield the words in the identifiers, comments and strings of a Python file."""
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        line = token.start[0]
        if token.type == tokenize.NAME:
            if not (before == "." and token.string in ALLOWED_ATTRIBUTES):
                yield from in_name(path, line, token.string)
        elif token.type == tokenize.STRING:
            yield from in_prose(path, line, token.string)
        before = token.string
    for line, text in comments(path):
        yield from in_prose(path, line, text)


def comments(path: Path) -> list[tuple[int, str]]:
    """Return the comments of a Python file with their first lines; adjacent lines are joined."""
    joined: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            first, text = joined[-1] if joined else (0, "")
            if joined and token.start[0] == first + text.count("\n") + 1:
                joined[-1] = first, f"{text}\n{token.string}"
            else:
                joined.append((token.start[0], token.string))
    return joined


def in_page(path: Path) -> Iterator[Finding]:
    """Yield the words in a Markdown page, except in the addresses of its links."""
    text = re.sub(r"\]\([^)\n]*\)|<!--.*?-->|`[^`\n]*`", "]", path.read_text())
    yield from in_prose(path, 1, text)


def default_files() -> list[Path]:
    """Return the files of the library, the documentation and the front pages."""
    pages = [path for path in Path("docs").rglob("*.md") if "_build" not in path.parts]
    examples = Path("docs/examples").glob("*.py")
    front = [Path(name) for name in PAGES]
    return sorted([*Path("fxshap").rglob("*.py"), *pages, *examples, *front])


def main(arguments: list[str] | None = None) -> int:
    """Print what there is; return 1 if there is anything."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.house_words",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    findings = [
        finding
        for path in options.files or default_files()
        for finding in (in_python(path) if path.suffix == ".py" else in_page(path))
    ]
    print(*(findings or ["no words of the private language"]), sep="\n")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
