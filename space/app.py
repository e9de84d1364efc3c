"""Web demo: find what hides in an image, and see how.

    python space/app.py --model camouflaged=FOLDER_OR_ID lesion=FOLDER_OR_ID ...

On a Space, set the variable UNCONCEAL_MODELS: "camouflaged=owner/run-cos, lesion=owner/srs-bus".
"""

import argparse
import asyncio
import atexit
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path


with contextlib.suppress(ImportError):
    import spaces  # noqa: F401  must come before torch on a ZeroGPU Space

# Set before gradio reads it. The folder of uploads and results is removed when the process ends.
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="unconceal-space-")
atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)

import gradio as gr
from answers import MAX_FILES, REPORT_COLUMNS, Demo, to_data_url
from catalog import Catalog, choose_sources, examples_of, use_of
from guard import Guard, keep_swept
from PIL import Image
from starlette.middleware import Middleware
from uploads import (
    MAX_BYTES,
    Download,
    ImageFiles,
    ImageInput,
    Refused,
    fetch,
    limit_pillow,
    read_image,
    upload_folder,
)


HERE = Path(__file__).parent
MAX_PIXELS = 50_000_000
MAX_WAITING = 100  # requests in the queue; more are refused
MAX_SESSIONS = 64  # visitors whose last result gradio keeps in memory


def build(demo: Demo, kept_seconds: int) -> gr.Blocks:
    """Lay out the page and connect its parts."""
    sources = demo.catalog.sources
    choices = [(use_of(name).title, name) for name in sources]
    shown_examples = [(path, name) for name in sources for path in examples_of(name)]
    busy = {"concurrency_id": "network", "api_visibility": "private"}
    with gr.Blocks(title="Unconceal", analytics_enabled=False) as page:
        gr.HTML(read_part("header.html"), elem_id="masthead")
        with gr.Tab("One image", id="one"), gr.Row(elem_id="one", equal_height=False):
            with gr.Column(scale=4, min_width=320, elem_id="ask"):
                network = gr.Radio(choices, value=choices[0][1], label="What are you looking for?", elem_id="network")
                image = ImageInput(
                    label="Image",
                    sources=["upload", "webcam", "clipboard"],
                    format="png",
                    height=260,
                    buttons=[],
                    placeholder="Drop an image here\n- or -\nChoose a file",
                    elem_id="image",
                )
                url = gr.Textbox(
                    label="Or a web address",
                    placeholder="https://…",
                    max_lines=1,
                    submit_btn="Load",
                    elem_id="address",
                )
                cards = [
                    {"title": f"{use_of(name).title}: {path.stem}", "image": thumbnail(path)}
                    for path, name in shown_examples
                ]
                examples = gr.HTML(cards, **read_parts("examples"), visible=bool(cards), elem_id="examples")
                fine = gr.Checkbox(
                    True, label="Fine edges", info="Refines large images in tiles. Takes longer.", elem_id="fine"
                )
                run = gr.Button("Find it", variant="primary", elem_id="run")
            with gr.Column(scale=8, min_width=320, elem_id="answer"):
                viewer = gr.HTML(None, **read_parts("viewer"), stages=None, elem_id="viewer")
                with gr.Row(elem_id="downloads"):
                    mask = Download("Mask (PNG)", interactive=False, elem_id="mask", size="md")
                    ask_cutout = gr.Button("Cut-out (PNG)", elem_id="ask-cutout", size="md", interactive=False)
                    cutout = gr.DownloadButton("Cut-out", visible="hidden")
                    seen = ImageInput(visible=False, format="png")  # the image of the result
        with gr.Tab("Many images", id="many"), gr.Row(elem_id="many", equal_height=False):
            with gr.Column(scale=4, min_width=320):
                batch_network = gr.Radio(choices, value=choices[0][1], label="What are you looking for?")
                images = ImageFiles(
                    label=f"Images, up to {MAX_FILES}", file_count="multiple", height=220, elem_id="images"
                )
                outputs = gr.CheckboxGroup(
                    [("Masks", "mask"), ("Cut-outs", "cutout")], value=["mask"], label="What do you need?"
                )
                batch_fine = gr.Checkbox(True, label="Fine edges", info="Takes longer for large images.")
                run_batch = gr.Button("Find all", variant="primary", elem_id="run-batch")
            with gr.Column(scale=8, min_width=320):
                archive = gr.File(label="All results (ZIP)", elem_id="archive", height=130, interactive=False)
                report = gr.Dataframe(
                    headers=REPORT_COLUMNS,
                    label="Report",
                    column_widths=["190px", "260px", "80px", "80px", "90px", "80px"],
                    wrap=True,
                    elem_id="report",
                    interactive=False,
                    buttons=["copy"],
                )
        with gr.Tab("API", id="program"):
            limits = {"minutes": kept_seconds / 60, "megapixels": MAX_PIXELS / 1e6, "megabytes": MAX_BYTES >> 20}
            gr.Markdown(read_part("program.md").format_map(limits))

        asked, shown = [image, network, fine], [viewer, mask, ask_cutout, image, seen]
        show = {"fn": demo.show, "inputs": asked, "outputs": shown, "show_progress_on": viewer, **busy}
        found = [gr.on([image.input, network.input, fine.input, run.click], trigger_mode="always_last", **show)]
        fetching = {"show_progress_on": viewer, "api_visibility": "private", "concurrency_limit": 8}
        found.append(url.submit(take_address, url, [image, viewer], **fetching).then(**show))

        def choose_example(event: gr.EventData) -> tuple[str, str]:
            path, name = shown_examples[event.index]
            return str(path), name

        unseen = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        found.append(examples.choose(choose_example, None, [image, network], **unseen).then(**show))

        async def open_address(event: gr.EventData):
            known = event.network if event.network in sources else gr.skip()
            if not event.url:
                return gr.skip(), gr.skip(), known, gr.skip()
            return *await take_address(event.url), known, event.url

        # The viewer sends this if the page was opened with ?url= or ?network=.
        opened = viewer.open(open_address, None, [image, viewer, network, url], **fetching)
        found.append(opened.then(**show))
        image.clear(
            lambda: (None, *[gr.update(interactive=False)] * 2, None),
            outputs=[viewer, mask, ask_cutout, seen],
            cancels=found,  # running requests belong to the image that was removed
            **unseen,
        )

        def unfold_seen(path: str | None, name: str) -> dict:
            # The time makes each answer new: the page ignores a value that it already has.
            return gr.update(stages={"answer": demo.show_stages(path, name), "at": time.time()})

        viewer.unfold(unfold_seen, [seen, network], viewer, show_progress="hidden", **busy)
        cut = ask_cutout.click(demo.show_cutout, [seen, mask, network], cutout, show_progress_on=ask_cutout, **busy)
        cut.success(None, cutout, js=read_part("download.js"), api_visibility="private")
        run_batch.click(
            demo.segment_batch,
            [images, batch_network, outputs, batch_fine],
            [archive, report],
            show_progress_on=archive,
            api_name="segment_batch",
            concurrency_id="network",
        )
        add_interface(demo, image, network, fine)
    return page


def add_interface(demo: Demo, image: ImageInput, network: gr.Radio, fine: gr.Checkbox):
    """Offer the API endpoints, named after the methods of `Demo`."""
    mask, cut = (gr.Image(format="png", label=label, visible=False) for label in ("mask", "cutout"))
    report = gr.JSON(label="report", visible=False)
    maps = gr.Gallery(format="png", label="maps", visible=False)
    for method, inputs, returned in (
        (demo.segment, [image, network, fine], [mask, report]),
        (demo.cutout, [image, network, fine], cut),
        (demo.unfold, [image, network], maps),
    ):
        gr.Button(visible=False).click(method, inputs, returned, api_name=method.__name__, concurrency_id="network")


async def take_address(url: str) -> tuple:
    """Fetch an image and return new values of image and viewer."""
    try:
        path = await fetch(url, upload_folder())
        await asyncio.to_thread(read_image, path)
    except Refused as error:
        return None, {"error": error.message}
    return path, gr.skip()


def thumbnail(path: Path) -> str:
    """Return a small version of an image as a data URL."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((144, 144))
    return to_data_url(small, "JPEG")


def read_part(name: str) -> str:
    """Return the text of a file in `page/`."""
    return (HERE / "page" / name).read_text(encoding="utf-8")


def read_parts(name: str) -> dict[str, str | bool]:
    """Return options for a `gr.HTML` drawn by files in `page/`."""
    html, script = read_part(f"{name}.html"), read_part(f"{name}.js")
    return {"html_template": html, "js_on_load": script, "apply_default_css": False}


THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="stone",
    radius_size="lg",
    font=["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_label_text_color="*neutral_600",
    block_title_text_color="*neutral_700",
    block_info_text_color="*neutral_600",
    color_accent="*primary_700",
    checkbox_background_color_selected="*primary_700",
    checkbox_border_color_selected="*primary_700",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Show networks that find hidden objects in a browser.")
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="NAME=ID",
        help="networks to offer. NAME: camouflaged, lesion, small-target, cut-out or any other. ID: folder, "
        "owner/name[@revision] on the Hub, or a name that `unconceal models` lists. Default: $UNCONCEAL_MODELS (pairs "
        "separated by commas), otherwise all networks that ship with an installed unconceal, and that of the last run "
        "of scripts/demo.sh",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 allows other machines")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--held", type=int, default=2, metavar="N", help="networks kept in memory (default: 2)")
    parser.add_argument(
        "--kept", type=int, default=900, metavar="SECONDS", help="time until uploads are deleted (default: 900)"
    )
    args = parser.parse_args()
    pairs = args.model or [pair for pair in re.split(r"[,\n]", os.environ.get("UNCONCEAL_MODELS", "")) if pair.strip()]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs atexit, which removes uploads
    limit_pillow(MAX_PIXELS)
    try:
        catalog = Catalog(choose_sources(pairs), max(1, args.held))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = build(Demo(catalog), max(1, args.kept))
    keep_swept(upload_folder(), max(1, args.kept))
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)  # no request skips the queue
    page.launch(
        server_name=None if "SPACE_ID" in os.environ else args.host,
        server_port=args.port,
        theme=THEME,
        css_paths=HERE / "page" / "style.css",
        favicon_path=HERE / "page" / "icon.svg",
        allowed_paths=[str(HERE / "examples")],
        max_file_size=MAX_BYTES,
        app_kwargs={"middleware": [Middleware(Guard)]},
        state_session_capacity=MAX_SESSIONS,
        footer_links=["api", "settings"],
        ssr_mode=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
