"""A protocol as the files of a Hub Space, which `evaluate.load("owner/name")` opens without this package."""

import json
import os
import re
import shutil
import sys
from importlib.metadata import requires
from pathlib import Path

from huggingface_hub import SpaceCardData

from .. import evaluation as metrics
from ..evaluation.protocols import PROTOCOLS
from ..utils.errors import UserError
from ..utils.files import replacing


APP = '''\
"""Score a mask against the truth in a browser."""

from pathlib import Path

import evaluate
import gradio as gr


metric = evaluate.load(str(Path(__file__).with_name("{script}")))


def score(prediction, truth):
    """Return the numbers of one pair of mask files as rows of a table."""
    if not (prediction and truth):
        raise gr.Error("Give a prediction and a truth.")
    try:
        numbers = metric.compute(predictions=[prediction], references=[truth])
    except (OSError, ValueError) as error:
        raise gr.Error(str(error)) from None
    return [[name, value] for name, value in numbers.items()]


demo = gr.Interface(
    score,
    [
        gr.Image(type="filepath", format="png", image_mode="L", label="Prediction (soft mask, 8-bit grey)"),
        gr.Image(type="filepath", format="png", image_mode="L", label="Truth (mask)"),
    ],
    gr.Dataframe(headers=["number", "value"], label="Scores"),
    title="{title}",
    description="{description}",
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch()
'''
USAGE = """\
## Use

```python
import evaluate

metric = evaluate.load("{id}")
metric.compute(predictions=[soft_mask], references=[true_mask])
```

Predictions and references are arrays or pictures of one size: soft masks in [0, 1], bool or 8-bit grey; true masks bool, 0 and 1, or 8-bit grey.

Options, with what they are unless told otherwise: {options}.
"""
REQUIREMENTS = ("datasets", "evaluate", "numpy", "pillow", "pysodmetrics", "scikit-image")
SDK_VERSION = "6.31.0"  # of gradio, that the page was tried with


def write_metric_space(name: str, out: str | Path, owner: str = "OWNER") -> list[str]:
    """Write a folder that can be pushed as a Space: script, its siblings, card, requirements, web page.

    Args:
        name: A key of `PROTOCOLS`.
        out: Folder to make. Its name is that of the Space, and `evaluate` wants the script to have it too.
        owner: Of the Space; its card names it.

    Returns:
        The names of the files.

    Raises:
        UserError: If there is no such protocol, the folder's name cannot be that of a Space, or it exists.
    """
    out = Path(out).absolute()
    if name not in PROTOCOLS:
        raise UserError(f"got protocol {name}, expected one of {', '.join(PROTOCOLS)}")
    # With a hyphen it is no name that Python code could import, or that would hide what the files here import.
    if not re.fullmatch(r"[A-Za-z0-9][\w.]*-[\w.-]*", out.name):
        raise UserError(
            f"got --out {out}, whose last part becomes the Space's name: letters, digits, _ and ., with a hyphen, such as "
            f"unconceal-{name}"
        )
    sources = Path(metrics.__file__).parent
    script = sources / f"unconceal_{name}.py"
    siblings = re.findall(r"^from \.(\w+) import", script.read_text(encoding="utf-8"), re.MULTILINE)
    if os.path.lexists(out):
        raise UserError(f"{out} exists already; choose another --out")
    protocol = PROTOCOLS[name]
    statement = sys.modules[protocol.score_image.__module__].__doc__.strip()
    title = f"Unconceal: protocol {name}"
    summary = statement.split("\n", 1)[0]
    with replacing(out) as folder:
        folder.mkdir()
        shutil.copyfile(script, folder / f"{out.name}.py")
        for sibling in siblings:
            shutil.copyfile(sources / f"{sibling}.py", folder / f"{sibling}.py")
        header = SpaceCardData(
            title=title,
            sdk="gradio",
            sdk_version=SDK_VERSION,
            app_file="app.py",
            license="apache-2.0",
            tags=["evaluate", "metric", "image-segmentation"],
            short_description=f"Masks scored by the protocol {name}",
        )
        options = protocol.options(**protocol.report_options)
        usage = USAGE.format(
            id=f"{owner}/{out.name}",
            options=", ".join(f"`{option}={value}`" for option, value in options.items()),
        )
        card = f"---\n{header.to_yaml()}\n---\n\n# {title}\n\n{statement}\n\n{usage}"
        (folder / "README.md").write_text(card, encoding="utf-8")
        ranges = [line.partition(";")[0].strip() for line in requires("unconceal")]
        needed = [line for line in ranges if re.match(r"[\w-]+", line).group() in REQUIREMENTS]
        (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in needed), encoding="utf-8")
        app = APP.format(script=f"{out.name}.py", title=json.dumps(title)[1:-1], description=json.dumps(summary)[1:-1])
        (folder / "app.py").write_text(app, encoding="utf-8")
    return sorted(path.name for path in out.iterdir())
