"""Rules of style that a machine can check, beyond those of ruff."""

import ast
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
MAX_WORDS = 12


def source_files() -> list[Path]:
    return [path for folder in ("modeling", "scripts", "space") for path in sorted((ROOT / folder).rglob("*.py"))]


def docstrings(path: Path):
    """Yield the line and the docstring of everything in a file that has one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def test_first_lines_of_docstrings_are_short():
    long = [
        f"{path.relative_to(ROOT)}:{line}: {first}"
        for path in source_files()
        for line, text in docstrings(path)
        if len((first := text.splitlines()[0]).split()) > MAX_WORDS
    ]
    assert long == [], f"say it in at most {MAX_WORDS} words:\n" + "\n".join(long)


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="needs git and a checkout")
def test_no_large_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = {name: (ROOT / name).stat().st_size for name in listed.split("\0") if name and (ROOT / name).exists()}
    pattern = "modeling/unconceal/pretrained/*.safetensors"
    weights = {name: size for name, size in sizes.items() if fnmatch(name, pattern)}
    assert [name for name, size in sizes.items() if size > (12_000_000 if name in weights else 1_000_000)] == []
    assert sum(weights.values()) <= 45_000_000
