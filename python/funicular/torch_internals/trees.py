"""Nested arguments and results as flat lists: ``torch.utils._pytree``, which torch's own modules use.

In its place: the package ``optree``, which has the same functions.
"""

from __future__ import annotations

from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

__all__ = ["TreeSpec", "keystr", "tree_flatten", "tree_flatten_with_path", "tree_leaves", "tree_map", "tree_unflatten"]
