"""What README and docs say runs: commands, Python blocks, inline expressions; tables come from records."""

import ast
import builtins
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import typing
from argparse import _SubParsersAction
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import unconceal
from unconceal.__main__ import main, make_parsers
from unconceal.commands import COMMANDS
from unconceal.data.synthetic import generate
from unconceal.models import modeling_unconceal
from unconceal.models.networks import NETWORKS
from unconceal.training.recipe import PhaseRecipe, Recipe, load_recipe
from unconceal.utils.errors import UserError


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.name for page in PAGES]
# Why a block may be parsed and resolved only. All others run.
REASONS = {
    *("a server", "a token", "the Hub", "minutes", "published weights", "raw data", "several GPUs"),
    *("several processes", "a checkout"),
}
FENCE = re.compile(r"(?:^<!-- (check only|file): ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALLER = {"--train 800": "--train 8", "--train 200": "--train 8", "--val 40": "--val 4"}
SMALLER |= {f"--size {size}": "--size 48" for size in (64, 96, 128)}
TILE = "Magnetic-tile-defect-datasets/MT_Break/Imgs/exp1_num_{}"
FILE = re.compile(r"[\w./*-]*\.(cff|csv|jpg|jsonl|json|md|mov|mp4|onnx|png|pt2|pth|py|sh|toml|txt|webm|yaml|yml)")


def blocks(page):
    """Yield the marker, what it says, the language and the text of each fenced block."""
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        yield match.groups()


def lines_of(block):
    for line in block.replace("\\\n", "").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.split("  #")[0].strip()


def inline_codes(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return list(dict.fromkeys(re.findall(r"`([^`\n]+)`", text)))


def parse(argv):
    """Parse the arguments of `unconceal` as its `main` does."""
    _, parser = make_parsers(argv[0])
    assert parser, f"there is no command {argv[0]}"
    if any(isinstance(action, _SubParsersAction) for action in parser._actions):
        return parser.parse_args(argv[1:])
    return parser.parse_intermixed_args(argv[1:])


def check_command(argv):
    """Check a command without running it."""
    program, *rest = argv
    if program == "unconceal":
        args = parse(rest)
        if rest[0] == "train":
            load_recipe(args.recipe, args.overrides)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch"
        args = launch_command_parser().parse_args(rest[1:])
        check_launched(args.module, args.training_script, args.training_script_args)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(rest)
        check_launched(args.module, args.training_script, args.training_script_args)
    elif program == "python":
        assert (ROOT / rest[0]).is_file()
        source = (ROOT / rest[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in rest[1:] if word.startswith("--")), argv
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert rest[:3] == ["install", "-c", "constraints.txt"] and rest[3] == "-e"
        assert set(re.findall(r"\w+", rest[4])) <= set(extras)
    elif program.startswith("scripts/"):
        assert os.access(ROOT / program, os.X_OK)
    else:
        pytest.fail(f"unknown kind of command: {shlex.join(argv)}")


def check_launched(module, script, arguments):
    name = {"unconceal": None, "scripts/train.py": "train"}[script]
    assert bool(module) is (name is None)
    check_command(["unconceal", *([name] if name else []), *arguments])


def run_line(line):
    """Run a command, or only check it if it installs or runs everything."""
    for text, smaller in SMALLER.items():
        line = line.replace(text, smaller)
    if "|" in line or ">" in line:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True, env={**os.environ, "PATH": path})
        return
    argv = shlex.split(line)
    check_command(argv)
    if argv[:2] == ["unconceal", "train"]:
        args = parse(argv[1:])
        recipe = load_recipe(args.recipe, args.overrides)
        quicker = ["processor.size={height: 32, width: 32}", "data.num_workers=0", "--overwrite"]
        quicker += [f"phases.{phase}.epochs=1" for phase in recipe.phases]
        argv[3:3] = quicker  # before the line's own arguments, the last of which may take a list
    if argv[:2] == ["unconceal", "prepare"]:
        argv.append("--overwrite")  # pages may make a data set again
    if argv[0] == "unconceal":
        assert main(argv[1:]) == 0, line


def check_python(code):
    """Compile a block, run its imports and resolve its names."""
    tree, namespace = ast.parse(code), {}
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "imports", "exec"), namespace)
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in stored:
            assert node.id in namespace or hasattr(builtins, node.id), f"{node.id} is not defined"
        if isinstance(node, ast.Attribute):
            inside = list(ast.walk(node))
            unknown = stored & {one.id for one in inside if isinstance(one, ast.Name)}
            if not unknown and not any(isinstance(one, ast.Call) for one in inside):
                eval(compile(ast.Expression(node), "attribute", "eval"), namespace)
    return namespace


class Names(dict):
    """What a reader of a page has at hand: the names of its blocks, then those of unconceal and transformers."""

    def __missing__(self, name):
        for module in (unconceal, transformers, modeling_unconceal):
            if hasattr(module, name):
                return getattr(module, name)
        if name == "unconceal" or name in ("datasets", "evaluate"):
            return importlib.import_module(name)
        raise KeyError(name)


def options_of(parser):
    """Return the options of a parser and of its subparsers."""
    options = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            options |= set().union(*map(options_of, action.choices.values()))
    return options


def all_options():
    options = set().union(*(options_of(make_parsers(name)[1]) for name in COMMANDS))
    for path in ("space/app.py", "scripts/build_docs.py", "scripts/test.sh"):
        options |= set(re.findall(r"--[a-z-]+", (ROOT / path).read_text(encoding="utf-8")))
    return options


def all_keywords():
    functions = [unconceal.load, unconceal.Segmenter.segment, transformers.pipeline]
    functions += [unconceal.SoftMaskPipeline.__call__, unconceal.SoftMaskPipeline._sanitize_parameters]
    functions += [task.forward for network in NETWORKS.values() for task in network.tasks.values()]
    return {name for function in functions for name in inspect.signature(function).parameters}


def check_recipe_key(key):
    """Walk a dotted key through the dataclasses of a recipe."""
    kind = Recipe
    for part in key.split("."):
        if kind == dict[str, PhaseRecipe]:
            assert any(part in network.tasks for network in NETWORKS.values()), f"{key}: {part} is no phase"
            kind = PhaseRecipe
        elif kind == dict[str, typing.Any]:
            configs = [{each.name for each in dataclasses.fields(one.config_class)} for one in NETWORKS.values()]
            processor = set(unconceal.UnconcealImageProcessor.valid_kwargs.__annotations__)
            assert part in set().union(processor, *configs), f"{key}: {part} is no field"
            return
        else:
            hints = typing.get_type_hints(kind)
            assert part in hints, f"{key}: {part} is no setting of a recipe"
            kind = hints[part]


def check_inline(code, names):
    """Run or resolve inline code that looks like a command, an option, a setting, a path or Python."""
    words = shlex.split(code) if code.count("'") % 2 == 0 and code.count('"') % 2 == 0 else code.split()
    roots = {field.name for field in dataclasses.fields(Recipe)}
    if words[0] == "unconceal" and len(words) > 1:
        commands = COMMANDS if words[1] == "COMMAND" else [words[1]]
        for name in commands:
            known = options_of(make_parsers(name)[1])
            assert {word for word in words if word.startswith("--")} <= known, code
    elif words[0].startswith("--"):
        assert words[0] in all_options() or words[0] == "--quiet", f"{code} is no option"
    elif words[0] == "python" or words[0].startswith("scripts/") and words[0].endswith(".sh"):
        check_command([words[0], *words[1:]])
    elif words[0] in ("accelerate", "torchrun", "tensorboard", "hf", "pip", "ruff"):
        assert (Path(sys.executable).parent / words[0]).exists(), code
    elif all(re.fullmatch(r"[a-z][\w.-]*=\S*", word) for word in words):
        keys = [word.partition("=")[0] for word in words]
        if code.endswith("=FOLDER_OR_ID"):
            assert f'"{keys[0]}"' in "".join(path.read_text() for path in (ROOT / "space").glob("*.py")), code
        elif all(key.split(".")[0] in roots for key in keys):
            load_recipe(ROOT / "configs/run/smoke.yaml", ["data.path=data", *words])
        else:
            assert set(keys) <= all_keywords() or keys[0] in names, f"{code} is no keyword"
    elif FILE.fullmatch(code) or "/" in code and "(" not in code:
        first = code.split("/")[0]
        if "/" in code and not code.startswith("/") and (ROOT / first).is_dir():
            assert list(ROOT.glob(re.sub("NAME|COMMAND|NETWORK", "*", code).rstrip("/"))), f"{code} is missing"
    elif re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", code) and code.split(".")[0] in roots:
        check_recipe_key(code)
    elif re.fullmatch(r"[A-Z][a-z]+[A-Z]\w+", code):
        eval(code, {}, names)
    else:
        try:
            tree = ast.parse(code, mode="eval")
        except SyntaxError:
            assert "(" not in code, f"{code} is no Python"
            return
        if any(isinstance(node, ast.Call | ast.Attribute | ast.Subscript) for node in ast.walk(tree)):
            eval(compile(tree, code, "eval"), {}, names)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Return a folder with what the pages take for granted: images, raw data, predictions and tiny networks."""
    folder = tmp_path_factory.mktemp("workshop")
    layouts = {
        "sirst/images/{}.png": "sirst/masks/{}_pixels0.png",
        **{
            f"Dataset_BUSI_with_GT/{name}/{name} ({{}}).png": f"Dataset_BUSI_with_GT/{name}/{name} ({{}})_mask.png"
            for name in ("benign", "malignant", "normal")
        },
        "Kvasir-SEG/images/{}.jpg": "Kvasir-SEG/masks/{}.jpg",
        "COD/TrainDataset/Imgs/{}.jpg": "COD/TrainDataset/GT/{}.png",
        "DIS5K/DIS-VD/im/{}.jpg": "DIS5K/DIS-VD/gt/{}.png",
        "Human-Segmentation-Dataset/Training_Images/{}.jpg": "Human-Segmentation-Dataset/Ground_Truth/{}.png",
        f"{TILE}.jpg": f"{TILE}.png",
        "mine/images/{}.jpg": "mine/masks/{}.png",
    }
    (folder / "images").mkdir()
    (folder / "predictions" / "theirs").mkdir(parents=True)
    for index in range(6):
        image, mask = generate("ultrasound", 48, seed=0, index=index)
        for layout in layouts.items():
            for path, content in zip(layout, (image, mask), strict=True):
                target = folder / "raw" / path.format(index)
                target.parent.mkdir(parents=True, exist_ok=True)
                content.save(target)
        mask.rotate(5).save(folder / "predictions" / "theirs" / f"{index}.png")
    photo = generate("infrared", (40, 60), seed=0, index=0)[0].convert("RGB")
    for name in ("photo.jpg", "a.jpg", "b.jpg", "images/photo.png"):
        photo.save(folder / name)
    for name in ("configs", "scripts", "modeling", "space", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_line("unconceal prepare synthetic --kind camouflage --size 64 --train 8 --val 4 --out data/synthetic")
        run_line("unconceal train configs/run/smoke.yaml data.path=data/synthetic")
        run_line("unconceal train configs/srs/smoke.yaml data.path=data/synthetic")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(0)  # a busy machine may take long
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_page_runs_as_written(page, workshop, tmp_path, monkeypatch):
    shutil.copytree(workshop, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names = Names(pixel_values=torch.zeros(1, 3, 64, 64))
    for marker, said, language, text in blocks(page):
        if marker == "file":
            path = tmp_path / said
            if said.startswith("configs/"):  # a recipe, whose base is in the same folder
                path = tmp_path / "written" / said
                shutil.copytree(ROOT / "configs", tmp_path / "written" / "configs", dirs_exist_ok=True)
            path.write_text(text, encoding="utf-8")
            if language == "yaml":
                load_recipe(path)
        elif language == "bash":
            for line in lines_of(text):
                check_command(shlex.split(line)) if marker == "check only" else run_line(line)
        elif language == "python":
            namespace = {}
            if marker == "check only":
                namespace = check_python(text)
            else:
                exec(compile(text, page.name, "exec"), namespace)
            names.update({name: value for name, value in namespace.items() if name != "__builtins__"})
    for code in inline_codes(page):
        check_inline(code, names)


@pytest.mark.parametrize(
    "code",
    [
        *("unconceal.explain.explain(image)", "unconceal.load(folder)", "Segmenter.nothing", "NothingConfig"),
        *("unconceal segment --nothing", "--nothing", "nothing=1", "best_metric=nothing"),
        *("phases.segmentation.nothing", "configs/run/nothing.yaml", "python scripts/nothing.py", "nothing(1"),
    ],
)
def test_wrong_inline_code_is_found(code):
    with pytest.raises((AssertionError, AttributeError, LookupError, NameError, UserError)):
        check_inline(code, Names(image=None))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_is_of_a_known_kind(page):
    text = page.read_text(encoding="utf-8")
    found = list(blocks(page))
    assert text.count("```") == 2 * len(found), "a fence is not closed, or is indented"
    for marker, said, language, _ in found:
        assert language in ("bash", "python") or language == "yaml" and marker == "file", f"{language} would not run"
        assert marker != "check only" or said in REASONS, f"unknown reason: {said}"
    markers = re.findall(r"<!-- (?:check only|file): ", text)
    assert len(markers) == sum(marker is not None for marker, *_ in found), "a marker stands before no block"
    outside = FENCE.sub("", text)
    assert not re.search(r"^(?: {4}|\t)", outside, re.MULTILINE), "indented text is a block that no test sees"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=[*IDS, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        other = page.parent / path if path else page
        assert other.exists(), f"{target} is missing"
        headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.fixture
def build_docs(monkeypatch, capsys):
    """Run scripts/build_docs.py and return (exit code, stdout)."""
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "scripts/build_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["build_docs.py", *map(str, arguments)])
        return module.main(), capsys.readouterr().out

    return run


def test_tables_match_their_records(build_docs):
    assert build_docs("--check") == (0, "")


def test_changed_digit_is_found_and_replaced(build_docs, tmp_path):
    page = tmp_path / "results.md"
    right = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    page.write_text(right.replace("0.813", "0.831"), encoding="utf-8")
    assert build_docs("--check", page) == (1, "stale: results.md; run python scripts/build_docs.py\n")
    assert build_docs(page) == (0, "")
    assert page.read_text(encoding="utf-8") == right


def test_records_say_what_produced_them():
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in (ROOT / "docs/results").glob("*.json"):
        about = json.loads(path.read_text(encoding="utf-8"))
        assert re.fullmatch("[0-9a-f]{7}", about["commit"]) and re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"]), path
        assert about["numbers"] and all(row.keys() == about["numbers"][0].keys() for row in about["numbers"]), path
        assert f"<!-- record {path.stem} -->" in shown, f"no page shows {path.name}"


def test_citation_names_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert citation["version"] == unconceal.__version__
    papers = yaml.safe_load((ROOT / "modeling/unconceal/hub/networks.yaml").read_text(encoding="utf-8"))
    for reference, paper in zip(citation["references"], papers.values(), strict=True):
        names = [f"{author['family-names']}, {author['given-names']}" for author in reference["authors"]]
        assert (reference["title"], " and ".join(names)) == (paper["title"], paper["authors"])
        assert str(reference["year"]) in paper["venue"]
