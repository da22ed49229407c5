"""Compare states of sources by their statements, without comments, docstrings and imports."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable


def digest_of(texts: Iterable[str]) -> str:
    """Return a digest of the statements of source files, whatever their order."""
    statements = sorted(
        ast.dump(without_docstrings(statement))
        for text in texts
        for statement in ast.parse(text).body
        if not isinstance(statement, ast.Import | ast.ImportFrom) and not is_docstring(statement)
    )
    return hashlib.sha256("\n".join(statements).encode()).hexdigest()[:12]


def without_docstrings(statement: ast.stmt) -> ast.stmt:
    """Remove the docstrings in a statement."""
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            node.body = [part for part in node.body if not is_docstring(part)]
    return statement


def is_docstring(statement: ast.stmt) -> bool:
    """Return True if a statement is a string by itself."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
