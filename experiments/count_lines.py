"""Count the Python of dsv3_jax by folder: `python experiments/count_lines.py`.

A line of code has a token that is neither a comment nor part of a docstring. Tokens a line say how
densely it is written: lines can be saved by packing, tokens cannot. The core is what a reader must
know: see CORE.
"""

import ast
import io
import tokenize
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "dsv3_jax"
CORE = (
    "config", "ops", "model", "mesh", "data", "chat", "training", "runs", "decoding", "host",
)  # fmt: skip
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip


class Counts(NamedTuple):
    """Sizes of a file, or sums of them."""

    files: int
    code: int  # lines of code
    tokens: int  # of code
    lines: int  # with comments, docstrings and blank lines

    def __add__(self, other: "Counts") -> "Counts":  # type: ignore[override]
        return Counts(*map(sum, zip(self, other, strict=True)))


def count_source(source: str) -> Counts:
    """Count one file.

    >>> count_source('def f():\\n    "Add."\\n\\n    # why\\n    return 1 + 1  # how\\n')
    Counts(files=1, code=2, tokens=9, lines=5)
    """
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            assert node.end_lineno is not None
            docstrings |= set(range(node.lineno, node.end_lineno + 1))

    code, tokens = set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE and token.start[0] not in docstrings:
            tokens += 1
            code |= set(range(token.start[0], token.end[0] + 1))
    return Counts(1, len(code), tokens, len(source.splitlines()))


def count(package: Path = PACKAGE) -> dict[str, Counts]:
    """Count by folder, and by file for those at the top."""
    counts: dict[str, Counts] = {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).with_suffix("").parts[0]
        of_file = count_source(path.read_text(encoding="utf-8"))
        counts[name] = counts.get(name, Counts(0, 0, 0, 0)) + of_file
    return counts


def with_sums() -> dict[str, Counts]:
    """The counts, and the sums of the core and of all."""
    counts, none = count(), Counts(0, 0, 0, 0)
    core = sum((counts[name] for name in CORE), none)
    return counts | {"core": core, "all": sum(counts.values(), none)}


def main() -> None:
    """Print the table."""
    print(f"{'':12s} {'files':>6s} {'code':>7s} {'tokens':>8s} {'a line':>7s} {'all lines':>10s}")
    for name, of in with_sums().items():
        mark = "  core" if name in CORE else ""
        print(
            f"{name:12s} {of.files:6,} {of.code:7,} {of.tokens:8,} {of.tokens / of.code:7.1f} "
            f"{of.lines:10,}{mark}"
        )


if __name__ == "__main__":
    main()
