"""Run by `tox -e wheel`: check the installed wheel, and copy the smoke set out of the source tree.

Usage: python wheel_check.py REPOSITORY TESTS_COPY (the wheel's path comes from tox in $TOX_PACKAGE)
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def main(repository: Path, copy: Path) -> None:
    """Exit with a message if something is wrong."""
    wheel = Path(os.environ["TOX_PACKAGE"])
    if not wheel.name.endswith("-py3-none-any.whl"):
        sys.exit(f"{wheel.name} is not a pure wheel")
    size = wheel.stat().st_size
    if size >= 5_000_000:
        sys.exit(f"{wheel.name} has {size} bytes, wanted less than 5 MB")

    import pyinfer

    where = Path(pyinfer.__file__).resolve()
    if repository.resolve() in where.parents and "site-packages" not in where.parts:
        sys.exit(f"the source tree is imported ({where}), not the wheel")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for path in sorted((repository / "tests").glob("*.py")):
        # Only files of the smoke set and what they share: others may import torch, which is not installed here.
        if not path.name.startswith("test_") or "mark.smoke" in path.read_text(encoding="utf-8"):
            shutil.copy(path, copy / path.name)
    print(f"{wheel.name}: {size / 1e3:.0f} KB, imported from {where.parent}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
