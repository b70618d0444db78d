"""Count the lines of Python in dsv3_jax by folder: `python experiments/count_lines.py`.

A line of code has a token that is neither a comment nor part of a docstring. The core is what a reader must know: see
CORE.
"""

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dsv3_jax"
CORE = ("config", "ops", "model", "mesh", "data", "training", "decoding")
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(source: str) -> int:
    """Count the lines of code.

    >>> code_lines('def f():\\n    "Add."\\n\\n    # why\\n    return 1 + 1  # how\\n')
    2
    """
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def count(package: Path = PACKAGE) -> dict[str, tuple[int, int, int]]:
    """Count by folder, and by file for those at the top: name → (files, lines of code, all lines)."""
    counts: dict[str, tuple[int, int, int]] = {}
    for path in sorted(package.rglob("*.py")):
        name, source = path.relative_to(package).with_suffix("").parts[0], path.read_text(encoding="utf-8")
        files, code, lines = counts.get(name, (0, 0, 0))
        counts[name] = files + 1, code + code_lines(source), lines + len(source.splitlines())
    return counts


def main() -> None:
    """Print the table, and the sums of the core and of all."""
    counts = count()
    sums = {
        "core": [sum(column) for column in zip(*(counts[name] for name in CORE), strict=True)],
        "all": [sum(column) for column in zip(*counts.values(), strict=True)],
    }
    print(f"{'':12s} {'files':>6s} {'code':>7s} {'all lines':>10s}")
    for name, (files, code, lines) in (counts | sums).items():
        print(f"{name:12s} {files:6,} {code:7,} {lines:10,}{'  core' if name in CORE else ''}")


if __name__ == "__main__":
    main()
