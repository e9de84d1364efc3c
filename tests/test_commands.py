"""The command line as a whole: help without heavy imports, exit codes, scripts and `python -m unconceal`."""

import errno
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import rejected
from safetensors import SafetensorError

from unconceal import __version__
from unconceal.__main__ import entry, main
from unconceal.commands import COMMANDS
from unconceal.utils.devices import choose_device
from unconceal.utils.errors import UserError, explained, run_main


ROOT = Path(__file__).parents[1]
# Each takes a second or more to import.
HEAVY = ["accelerate", "datasets", "gradio", "huggingface_hub", "matplotlib", "pandas", "pyarrow", "scipy", "skimage"]
HEAVY += ["torch", "transformers"]
# Prints which of these are imported after the help of a command.
HELP = """
import contextlib, io, json, sys

sys.argv = ["unconceal"]
from unconceal.__main__ import main

imported = {}
for command in json.loads(sys.stdin.read()):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert text.getvalue().startswith("usage: unconceal"), text.getvalue()
    imported[" ".join(command)] = sorted(set(sys.modules) & set(HEAVY))
print(json.dumps(imported))
"""
SCRIPTS = {
    "benchmark.py": "benchmark",
    "convert_checkpoint.py": "convert",
    "evaluate.py": "evaluate",
    "export.py": "export",
    "predict.py": "segment",
    "prepare_data.py": "prepare",
    "push_to_hub.py": "push",
    "train.py": "train",
}


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **options)


def test_help_imports_nothing_heavy():
    commands = [[], *([name] for name in COMMANDS), ["evaluate", "table"], ["prepare", "folder"], ["push", "model"]]
    done = run("-c", HELP.replace("HEAVY", repr(HEAVY)), input=json.dumps(commands))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {" ".join(command): [] for command in commands}


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n    {name}" not in printed] == []


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"unconceal {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["find"], ["train"], ["segment", "--frobnicate"]])
def test_wrong_command_lines_print_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: unconceal")


def test_every_script_is_a_command(monkeypatch, capsys):
    """Documented commands such as `accelerate launch scripts/train.py` keep working."""
    tools = {
        "build_docs.py",
        "gpu_check.py",
        "kill_check.py",
        "score_backgrounds.py",
        "ship_model.py",
        "study_run.py",
        "study_srs.py",
    }  # of this repository
    assert {path.name for path in (ROOT / "scripts").glob("*.py")} - tools == set(SCRIPTS)
    monkeypatch.setattr(sys, "path", sys.path[:])  # scripts change it
    for script, command in SCRIPTS.items():
        monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / script), "--help"])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(sys.argv[0], run_name="__main__")
        assert (caught.value.code, capsys.readouterr().out[:40].split()[:3]) == (0, ["usage:", "unconceal", command])


def test_shell_scripts_name_tests_that_exist():
    for script in (ROOT / "scripts").glob("*.sh"):
        for pattern in re.findall(r"tests/[\w*]+\.py", script.read_text(encoding="utf-8")):
            assert list(ROOT.glob(pattern)), f"{script.name} names {pattern}"


def test_scripts_do_not_hide_the_library_evaluate():
    code = "import runpy, sys; sys.argv = ['train.py']; sys.path.insert(0, 'scripts')\n"
    code += "runpy.run_path('scripts/train.py'); import evaluate; print(evaluate.load)"
    pytest.importorskip("evaluate")
    done = run("-c", code)
    assert done.stdout.startswith("<function load"), done.stderr


def test_names_after_two_dashes_may_begin_with_a_dash(tmp_path, monkeypatch):
    (tmp_path / "-a.jpg").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nowhere"):  # the arguments were understood
        main(["segment", "--model", "nowhere", "--out", "out", "--", "-a.jpg"])


@pytest.mark.parametrize("start", [["-m", "unconceal"], ["scripts/train.py"]])
def test_users_mistakes_give_one_line(start):
    arguments = ["train"] if start[0] == "-m" else []
    done = run(*start, *arguments, "nowhere.yaml")
    assert done.returncode == 2
    assert done.stderr == "error: cannot read recipe nowhere.yaml: No such file or directory\n"


def test_networks_are_registered_unless_the_command_line_starts(tmp_path):
    """A program may take the word unconceal as an argument."""
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__init__.py").write_text("import unconceal\n")
    program = "import sys; print('unconceal.models.networks' in sys.modules)\n"
    (tmp_path / "program" / "__main__.py").write_text(program)
    done = run("-m", "program", "unconceal", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.stdout == "True\n", done.stderr


def test_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("UNCONCEAL_DEBUG", "1")
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: main(["train", "nowhere.yaml"]))
    assert caught.value.code == 2
    assert re.search("Traceback.*FileNotFoundError", capsys.readouterr().err, re.DOTALL)


def test_home_folder_of_paths_is_expanded(tmp_path, monkeypatch):
    """Recipes expand their own paths."""
    seen = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("unconceal.commands.train.run", seen.append)
    main(["train", "~/recipe.yaml", "data.path=~/data", "seed=1", "--seeds=3"])
    assert (seen[0].recipe, seen[0].overrides) == (f"{tmp_path}/recipe.yaml", ["data.path=~/data", "seed=1"])
    assert seen[0].argv[1:3] == ["~/recipe.yaml", "data.path=~/data"]
    monkeypatch.setattr("unconceal.commands.explain.run", seen.append)
    main(["explain", "a~b.png", "--model=~/m", "--out=~/sheet.png"])
    assert (str(seen[1].image), seen[1].model, seen[1].out) == ("a~b.png", f"{tmp_path}/m", tmp_path / "sheet.png")
    monkeypatch.setattr("unconceal.commands.prepare.run", seen.append)
    main(["prepare", "folder", "--masks", "~/masks", "--out", "~", "--mask-suffix", "~"])
    assert (seen[2].masks, seen[2].out, seen[2].mask_suffix) == (f"{tmp_path}/masks", str(tmp_path), "~")
    monkeypatch.setattr("unconceal.commands.evaluate.run", seen.append)
    main(["evaluate", "--predictions", "~/p", "--truth-suffix=~", "--name", "~/x"])
    assert (seen[3].predictions, seen[3].truth_suffix, seen[3].name) == (f"{tmp_path}/p", "~", "~/x")


ODD = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        (["train", ODD], "got caf?,"),
        (["train", "recipe.yaml", f"output_dir={ODD}"], "got output_dir=caf?,"),
        (["train", "recipe.yaml", "--", f"data.path={ODD}"], "got data.path=caf?,"),
        (["prepare", "folder", "--source", ODD, "--out", "data"], "got --source caf?,"),
        (["prepare", "folder", "--source", "raw", f"--out={ODD}"], "got --out caf?,"),
        (["evaluate", "--predictions", "masks", "--out", ODD], "got --out caf?,"),
        (["evaluate", "table", "a", ODD], "got caf?,"),
        (["segment", "a.png", "--out", "masks", "--model", ODD], "got --model caf?,"),
        (["segment", "a.png", "--model", "polyp", "--out", ODD], "got --out caf?,"),
    ],
)
def test_names_that_are_no_text_are_refused(arguments, got):
    with rejected(re.escape(f"{got} expected a name in UTF-8; choose another folder, or rename it")):
        main(arguments)


def test_images_may_have_names_that_are_no_text(monkeypatch):
    seen = []
    monkeypatch.setattr("unconceal.commands.segment.run", seen.append)
    main(["segment", ODD, "a.png", "--background", ODD, "--model", "polyp", "--out", "masks"])
    assert (seen[0].paths, seen[0].background) == ([ODD, "a.png"], ODD)
    monkeypatch.setattr("unconceal.commands.explain.run", seen.append)
    main(["explain", ODD, "--model", "polyp", "--out", "sheet.png"])
    assert seen[1].image == Path(ODD)


def test_names_that_are_no_text_are_printed(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["unconceal"])
    monkeypatch.setattr("unconceal.commands.models.run", lambda args: stdout.writelines([ODD]))
    with pytest.raises(SystemExit) as caught:
        entry("models")
    assert (caught.value.code, stdout.buffer.getvalue()) == (0, b"caf\\udce9")


LESS = "lower the batch size, or the size of the images or the network"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "error: No space left on device: out/x\n"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "error: File name too long\n"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "error: No space left on device\n"),
        (OSError(errno.ELOOP, "x", "out"), "error: Too many levels of symbolic links: out\n"),
        (RuntimeError("Symlink loop from '/out'"), "error: Symlink loop from '/out'; give another path\n"),
        (MemoryError("Unable\n to"), f"error: memory ran out (Unable to); {LESS}\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), f"error: memory ran out (CUDA out of memory); {LESS}\n"),
    ],
)
def test_errors_of_the_machine_are_one_line(capsys, error, expected):
    def fail():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(fail)
    assert (caught.value.code, capsys.readouterr().err) == (2, expected)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "x"), OSError("x"), RuntimeError("x"), KeyError(28)]
)
def test_defects_stay_visible(error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        run_main(fail)


def test_too_little_memory_of_torch_is_one_line():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    assert explained(caught.value).startswith("memory ran out (")


@pytest.mark.parametrize("name", ["meta", "hpu", "privateuseone"])
def test_unusable_devices_are_refused(name):
    with rejected(f"got the device '{name}', which torch cannot use here; try cpu"):
        choose_device(name)
