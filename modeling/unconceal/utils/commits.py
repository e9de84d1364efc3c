"""Name the commit of this package."""

import subprocess
from functools import partial
from pathlib import Path


def git_commit() -> str | None:
    """Return the commit of this package, or None outside git.

    It ends in "-dirty" if files differ from the commit.
    """
    here = Path(__file__).resolve()
    git = partial(subprocess.run, cwd=here.parent, capture_output=True, text=True, check=True)
    try:
        # If installed inside another project's checkout, this file is not in that repository.
        git(["git", "ls-files", "--error-unmatch", here.name])
        return git(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
