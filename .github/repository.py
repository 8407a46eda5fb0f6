"""Writes the repository's address into what PyPI shows: links of the README, and `project.urls`.

The sources do not know where they are hosted; the workflow that builds a release does. Run as
`python3 .github/repository.py https://github.com/OWNER/NAME v0.2.0`; it changes README.md and pyproject.toml in place.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def absolute(readme: str, address: str, ref: str) -> str:
    """Return the README with links to files of the repository as addresses."""
    return re.sub(r"\]\((?!#|[a-z]+:)([^)]+)\)", rf"]({address}/blob/{ref}/\1)", readme)


def with_urls(pyproject: str, address: str, ref: str) -> str:
    """Return pyproject.toml with `project.urls`."""
    urls = {
        "Repository": address,
        "Documentation": f"{address}/tree/{ref}/docs",
        "Issues": f"{address}/issues",
        "Changelog": f"{address}/blob/{ref}/CHANGELOG.md",
    }
    table = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    head, scripts, rest = pyproject.partition("[project.scripts]\n")
    if not scripts or "[project.urls]" in pyproject:
        sys.exit("error: pyproject.toml has no [project.scripts], or has [project.urls] already")
    return f"{head}[project.urls]\n{table}\n{scripts}{rest}"


if __name__ == "__main__":
    address, ref = sys.argv[1:]
    for path, change in (Path("README.md"), absolute), (Path("pyproject.toml"), with_urls):
        path.write_text(change(path.read_text(), address, ref))
