"""Every command and every line of Python in the README runs, on smaller numbers."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from unconceal.data.synthetic import generate


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# These two install and run everything, this test included; continuous integration runs them as they stand.
WHOLE = {"scripts/demo.sh", "scripts/test.sh"}
SMALLER = {"--train 800": "--train 8", "--val 40": "--val 4"}
USES_A_MODEL = ("unconceal", "push_to_hub.py", "export.py")
QUICKER = " processor.size='{height: 32, width: 32}' phases.segmentation.epochs=1 data.num_workers=0"


def commands():
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", "").splitlines():
            command = shlex.split(line, comments=True)
            if command:
                yield shlex.join(command)


def make_raw_folders(folder):
    """The layouts that the README's builders read, six pictures each."""
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
        "mine/images/{}.jpg": "mine/masks/{}.png",
    }
    for image_path, mask_path in layouts.items():
        for index in range(6):
            picture, mask = generate("ultrasound", 48, seed=0, index=index)
            for path, content in ((image_path, picture), (mask_path, mask)):
                target = folder / path.format(index)
                target.parent.mkdir(parents=True, exist_ok=True)
                content.save(target)
            theirs = folder.parent / "predictions" / "theirs" / f"{index}.png"
            theirs.parent.mkdir(parents=True, exist_ok=True)
            mask.rotate(5).save(theirs)


@pytest.mark.slow
def test_commands_and_python_run(tmp_path):
    for name in ("scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    make_raw_folders(tmp_path / "raw")
    (tmp_path / "pictures").mkdir()
    generate("infrared", (40, 60), seed=0, index=0)[0].save(tmp_path / "pictures" / "photo.png")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(command, **options):
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, **options
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"

    todo = [command for command in commands() if command not in WHOLE]
    # What uses a model stands before what makes one.
    todo.sort(key=lambda command: any(name in command for name in USES_A_MODEL))
    assert len(todo) >= 6, "the README lost its commands"
    for command in todo:
        for text, smaller in SMALLER.items():
            command = command.replace(text, smaller)
        command += QUICKER if "train.py" in command else ""
        run(command, shell=True)

    assert Image.open(tmp_path / "segmented" / "photo.png").size == (60, 40)
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        check = "import numpy\nmask = numpy.asarray(mask)\nwhite = 255 if mask.dtype == numpy.uint8 else 1\n"
        check += "assert mask.shape == (40, 60) and 0 <= mask.min() <= mask.max() <= white"
        run([sys.executable, "-c", f"{block}\n{check}"])


def test_the_two_commands_exist():
    assert set(commands()) >= WHOLE
    for script in WHOLE:
        assert os.access(ROOT / script, os.X_OK)


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"`((?:configs|scripts|tests)/[\w./]+)`?", README):
        assert (ROOT / name).exists(), name
    for path in ROOT.glob("configs/*/*.yaml"):
        assert str(path.relative_to(ROOT)) in README, f"{path} is not in the README"
