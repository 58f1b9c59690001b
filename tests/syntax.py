"""What tests of the source code ask of its syntax trees."""

from __future__ import annotations

import ast


def assigned(node: ast.AST) -> list[ast.expr]:
    """What a statement assigns or deletes, each part of a tuple for itself; empty for another node."""
    targets: list[ast.expr] = []
    if isinstance(node, (ast.Assign, ast.Delete)):
        targets = node.targets
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        targets = [node.target]
    return [
        part for target in targets for part in (target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target])
    ]


def root_name(node: ast.AST) -> str:
    """`a` of `a.b[c].d`; "" where it begins with something else than a name."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
