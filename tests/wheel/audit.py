"""`make wheel` asks auditwheel whether a wheel runs where its name says: the machines' glibc, and each Python from 3.10."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path


def glibc(tag: str) -> tuple[int, ...]:
    """Return the version of glibc that a platform tag asks for: (2, 28) for manylinux_2_28_x86_64."""
    found = re.match(r"manylinux_(\d+)_(\d+)", tag)
    if found is None:
        sys.exit(f"error: auditwheel finds the wheel to be {tag}: it needs what only this machine is known to have")
    return tuple(int(number) for number in found.groups())


def main() -> None:
    """Print what auditwheel says; end with an error if it is not what the name says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--platform", required=True, help="the oldest glibc, such as manylinux_2_28")
    parser.add_argument("wheel", type=Path)
    options = parser.parse_args()
    wheel: Path = options.wheel
    if f"-cp310-abi3-{options.platform}_" not in wheel.name:
        sys.exit(f"error: {wheel.name} is not named for Python 3.10 and newer (cp310-abi3) and {options.platform}")
    show = [sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)]
    told = json.loads(subprocess.run(show, check=True, stdout=subprocess.PIPE).stdout)
    print(f"{wheel} ({wheel.stat().st_size >> 10} KiB) runs from {told['overall_tag']} on")
    if glibc(told["overall_tag"]) > glibc(options.platform):
        sys.exit(f"error: auditwheel finds symbols newer than {options.platform}: {told['versioned_symbols']}")


if __name__ == "__main__":
    main()
