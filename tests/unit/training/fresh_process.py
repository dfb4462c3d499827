"""Code in a process that has imported nothing yet."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection


def last_line(code: str, *, without: Collection[str], **variables: str) -> str:
    """The last line that ``code`` prints; of the environment ``without`` is left out and ``variables`` is added."""
    clean = {name: value for name, value in os.environ.items() if name not in without}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def said_before_torch(arguments: list[str], variables: Collection[str]) -> str:
    """What the command has set these variables of the environment to when it first imports torch, with spaces between;
    it ends there."""
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(*map(os.environ.get, {list(variables)!r}), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
from eulerforge.cli.main import main
main({arguments!r})
"""
    return last_line(code, without=variables)
