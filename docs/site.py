"""What mkdocs does not know by itself: links out of docs/, anchors as hosts of repositories make them, roles in docstrings."""

from __future__ import annotations

import re
from typing import Any

from markdown.extensions.toc import TocExtension

_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")
_ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):<code>~?([^<]+)</code>")


def _slug(text: str, separator: str) -> str:
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", separator)


def on_config(config: Any) -> Any:
    """Give headings the anchors that links between the pages use."""
    config["markdown_extensions"] = [name for name in config["markdown_extensions"] if name != "toc"]
    config["markdown_extensions"].append(TocExtension(slugify=_slug, permalink=False))
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name files of the repository that are no pages of the site, in place of a link to them."""
    return _LINK.sub(r"\1 (`\2` in the repository)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show what docstrings refer to as code."""
    return _ROLE.sub(r"<code>\1</code>", html)
