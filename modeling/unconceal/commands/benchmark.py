"""Measure what the networks cost: size, time, memory."""

import argparse
import json
import math
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..utils.arguments import positive_int
from ..utils.errors import UserError
from ..utils.files import has_keys, is_taken, make_folder, replacing
from ..utils.markdown import markdown_table


if TYPE_CHECKING:
    from ..evaluation.cost import Measurement, Part

# Side of the image in pixels, and batch sizes, by default.
DEFAULTS = {
    "srs": (256, (1, 8)),
    "run": (384, (1,)),
    "run-pvtv2-b4": (384, (1,)),
    "opds": (1024, (1,)),
    "opds-single-head": (1024, (1,)),
    "segformer-b2": (1024, (1,)),
}
PEER = "segformer-b2"
PROCESSOR = "preprocessor_config.json"
# Sides whose time for a pixel is compared.
GROWTH = {"srs": (256, 512, 1024), "run": (256, 384, 512, 1024), "opds": (512, 1024, 2048)}
SCAN_SIDE = 96  # of a sequence of 9,216
PARTS = ("size", "inference", "growth", "operators", "training", "recipes", "path", "start")
DTYPES = ("float32", "bfloat16", "float16")
# What tables call forms and operators.
FORMS = {
    "plain": "as trained",
    "inference": "for inference",
    "compiled": "for inference, compiled",
    "onnx": "ONNX",
    "torch": "ours",
}
OPERATORS = {"scan": "scan", "scan-training": "scan, forward and backward"}


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal benchmark`."""
    parser.description = (
        "Print Markdown tables of size, time and memory. Compare numbers of one run only. Every measurement runs in a "
        "fresh process. The exit code is 1 if one of them failed."
    )
    add = parser.add_argument
    names = f"some of {', '.join(DEFAULTS)}, or saved networks: folders or shipped ones (srs run opds)"
    add("models", nargs="*", metavar="MODEL", help=names)
    add("--only", nargs="+", choices=PARTS, default=PARTS[:4], help=f"parts to run ({' '.join(PARTS[:4])})")
    add("--image-size", type=positive_int, metavar="N", help="side in pixels (srs 256, run 384, opds 1024)")
    add("--batch-sizes", type=positive_int, nargs="+", metavar="N", help="images at once (srs 1 8, others 1)")
    add("--device", default="cpu", help="cpu, cuda, ... (cpu)")
    add("--dtype", nargs="+", default=DTYPES[:2], choices=DTYPES, help="types to measure (float32 bfloat16)")
    add("--compile", action="store_true", help="also compile the networks by torch.compile, which takes minutes")
    add("--onnx", action="store_true", help="also export the networks to ONNX, which takes minutes")
    add("--recipes", type=Path, nargs="+", default=[], metavar="FILE", help="recipes for --only recipes")
    add("--photos", type=positive_int, default=8, metavar="N", help="images for --only path (8)")
    add("--steps", type=positive_int, default=3, metavar="N", help="timed repetitions; the fastest counts (3)")
    add("--rounds", type=positive_int, default=1, metavar="N", help="times to measure each table (1)")
    add("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    add("--records", type=Path, metavar="PREFIX", help="also write each table to PREFIX-NAME.json, as in docs/results")


def run(args: argparse.Namespace) -> int:
    """Run the parts and print their tables."""
    from ..evaluation.cost import count_parts, machine
    from ..utils.commits import git_commit
    from ..utils.devices import choose_device

    models = [model if model in DEFAULTS else _folder(model) for model in args.models or GROWTH]
    sizes = {model: args.image_size or _default_size(model) for model in models}
    if args.image_size is not None and args.image_size < 128:
        raise UserError(f"got --image-size {args.image_size}, expected at least 128")
    if "recipes" in args.only and not (args.recipes and all(path.is_file() for path in args.recipes)):
        raise UserError(f"got --recipes {shlex.join(map(str, args.recipes))}; give files of recipes")
    choose_device(args.device)
    if args.json:
        make_folder(args.json.parent)
        if is_taken(args.json) and not has_keys(args.json, "measurements"):
            raise UserError(f"got --json {args.json}, which is no report of this command; give another file")
    for name in (*PARTS, "targets", *(Path(model).name for model in models)) if args.records else ():
        if is_taken(file := _record_file(args, name)) and not has_keys(file, "title", "hardware", "numbers"):
            raise UserError(f"got --records {args.records}, but {file} is no record; give another prefix")
    report = {
        "command": shlex.join(["unconceal", *args.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        **machine(),
    }
    print("\n".join(f"- {name}: {value}" for name, value in report.items()))

    def show(name: str, title: str, rows: list[dict]):
        keys = dict.fromkeys(key for row in rows for key, cell in row.items() if cell)
        rows = [{key: row.get(key) or "" for key in keys} for row in rows]
        print(f"\n## {title}\n\n{markdown_table(keys, (row.values() for row in rows))}", flush=True)
        if args.records:
            _write(_record_file(args, name), _record(title, report, rows))

    if "size" in args.only:
        parts = [(model, size, part) for model, size in sizes.items() for part in count_parts(model, size)]
        report["size"] = [{"model": model, "image_size": size, **vars(part)} for model, size, part in parts]
        show("size", "Size", [_size_row(*part) for part in parts])
    results = {}
    with TemporaryDirectory() as folder:
        for name, title, groups in _tables(sizes, args, Path(folder)):
            _measure([case for group in groups for case in group], results, args.rounds)
            rows = [row for group in groups for row in _rows({case: results[case] for case in group})]
            if rows:
                show(name, title, rows)
    report["measurements"] = list(results.values())
    report["targets"] = _targets(results)
    if report["targets"]:
        show("targets", "Targets", report["targets"])
    if args.json:
        _write(args.json, report)
    return 1 if any("error" in result for result in results.values()) else 0


def _folder(model: str) -> str:
    from ..hub.shipped import resolve, shipped_names

    folder = Path(resolve(model) if model in shipped_names() else model)
    if not (folder / PROCESSOR).is_file():
        known = ", ".join((*DEFAULTS, *shipped_names()))
        raise UserError(f"got the model {model}, expected some of {known}, or the folder of a saved one")
    return str(folder)


def _default_size(model: str) -> int:
    if model in DEFAULTS:
        return DEFAULTS[model][0]
    from ..models.image_processing_unconceal import UnconcealImageProcessor
    from ..utils.loading_errors import loading_explained

    with loading_explained(f"cannot load the settings of {model}"):
        return UnconcealImageProcessor.from_pretrained(model).size.height


def _record_file(args: argparse.Namespace, name: str) -> Path:
    return args.records.with_name(f"{args.records.name}-{name}.json")


def _tables(
    sizes: dict[str, int], args: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, str, list[list["Measurement"]]]]:
    """Yield each table: name, title and groups that begin with a baseline."""
    from ..evaluation.cost import Measurement

    case = partial(Measurement, device=args.device, steps=args.steps)
    on_cpu = args.device == "cpu"
    kept = (False, True) if on_cpu else (True,)
    for model, size in sizes.items() if "inference" in args.only else ():
        name, groups = Path(model).name, []
        batch_sizes = args.batch_sizes or DEFAULTS.get(model, (0, (1,)))[1]
        for batch_size in batch_sizes:
            infer = partial(case, "inference", batch_size=batch_size, image_size=size)
            group = [infer(model, "plain", keeps_pages=keeps) for keeps in kept]
            if model != PEER:
                for form in ["inference"] + ["compiled"] * args.compile:
                    group += [infer(model, form, dtype=dtype) for dtype in args.dtype]
                group += [infer(model, "onnx", file=str(folder / name))] * args.onnx
                group += [infer(PEER, "plain", keeps_pages=keeps) for keeps in kept if batch_size == batch_sizes[0]]
            groups.append(group)
        yield name, f"{name}: inference", groups
    if "growth" in args.only:
        groups = [[case(model=model, image_size=side) for side in GROWTH[model]] for model in sizes if model in GROWTH]
        yield "growth", "Growth of the time for a pixel", groups
    if "operators" in args.only:
        groups, forms = [], ["torch"] if on_cpu else ["torch", "triton", "mamba_ssm"]
        for task, loop_steps in (("scan", args.steps), ("scan-training", 0)):  # the loop takes ten seconds
            scan = partial(case, task, image_size=SCAN_SIDE)
            fast = [scan(form=form, dtype=dtype) for form in forms for dtype in args.dtype]
            groups.append([scan(form="loop", steps=loop_steps), *fast])
        yield "operators", "The scan against its definition, a loop", groups
    if "training" in args.only:
        groups = []
        for model, size in sizes.items():
            step = partial(case, "training", model, batch_size=(args.batch_sizes or [1])[0], image_size=size)
            group = [step(form=form, dtype=dtype) for dtype in args.dtype for form in ("plain", "channels_last")]
            groups.append([*group, step(form="channels_last", gradient_checkpointing=True)])
        yield "training", "Training steps", groups
    if "recipes" in args.only:
        yield "recipes", "Training loops beside the network alone", [[case("recipe", str(p)) for p in args.recipes]]
    if "path" in args.only:
        group = [case("path", model, image_size=size, num_photos=args.photos) for model, size in sizes.items()]
        yield "path", f"`unconceal segment` on {args.photos} photos of 12 megapixels", [group]
    if "start" in args.only:
        yield "start", "`unconceal segment` from its start to the first mask", [[case("start")]]


def _measure(cases: list["Measurement"], results: dict["Measurement", dict], rounds: int):
    """Add the results of new cases; the fastest round counts."""
    from tqdm import tqdm

    from ..evaluation.cost import run_measurement

    for case in tqdm([case for case in cases if case not in results] * rounds, disable=None, leave=False):
        before = results.get(case)
        if before is None or "seconds" in before:  # what failed is not tried again
            result = run_measurement(case)
            if before is None or result.get("seconds", math.inf) < before["seconds"]:
                results[case] = result


def _rows(group: dict["Measurement", dict]) -> Iterator[dict[str, str]]:
    """Yield the cells of a group; ratios compare with its first."""
    base = None
    for case, result in group.items():
        row = {"network": OPERATORS.get(case.task, Path(case.model).stem)}
        if case.task not in ("recipe", "path", "start"):
            size = f"{case.image_size}x{case.image_size}"
            row |= {"image": size, "batch": str(case.batch_size), "form": _form(case)}
        if "skipped" in result or "error" in result:
            yield row | {"ms/image": result.get("error") or f"skipped: {result['skipped']}"}
        elif "form" not in row:
            own = {key.replace("_", " "): value for key, value in result.items() if not hasattr(case, key)}
            yield row | {key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in own.items()}
        else:
            seconds = result["seconds"] / case.batch_size
            base = base or seconds / case.image_size**2
            yield row | {
                "ms/image": f"{1000 * seconds:.4g}",
                "ratio": f"{seconds / case.image_size**2 / base:.2f}",
                "first call": f"{result['first_seconds']:.1f} s",
                "memory": f"{result['own_gib' if case.task in OPERATORS else 'peak_gib']:.2f} GiB",
                "scans": f"{result['scan_share']:.0%}" if "scan_share" in result else "",
            }


def _form(case: "Measurement") -> str:
    parts = [FORMS.get(case.form, case.form)] + [case.dtype] * (case.dtype != "float32")
    parts += ["pages given back"] * (not case.keeps_pages) + ["gradient checkpointing"] * case.gradient_checkpointing
    return ", ".join(parts)


def _size_row(model: str, size: int, part: "Part") -> dict[str, str]:
    # The authors' figures hold for the default network, multiply-adds for the default size.
    parameters, adds = part.published if model in DEFAULTS else (None, None)
    adds = adds if size == _default_size(model) else None
    return {
        "network": Path(model).name,
        "image": f"{size}x{size}",
        "part": part.name,
        "parameters": f"{part.parameters / 1e6:.3f} M",
        "published parameters": "" if parameters is None else f"{parameters:g} M",
        "multiply-adds": f"{part.multiply_adds / 1e9:.2f} G",
        "published multiply-adds": "" if adds is None else f"{adds:g} G",
    }


def _targets(results: dict["Measurement", dict]) -> list[dict[str, str]]:
    """Compare the measurements with the targets of the project."""
    from ..evaluation.cost import Measurement

    rows = []

    def expect(claim: str, limit: float, *cases: Measurement, key: str = "seconds", at_least: bool = False):
        # Two cases give their ratio, more the ratio of the largest to the smallest.
        values = [results.get(case, {}).get(key) for case in cases]
        if None in values:
            return
        if len(values) > 2:
            values = [max(values), min(values)]
        reached = values[0] / (values[1] if len(values) > 1 else 1)
        target, met = f"at {'least' if at_least else 'most'} {limit:.3g}", (reached >= limit) == at_least
        rows.append({"claim": claim, "target": target, "reached": f"{reached:.3g}", "met": "yes" if met else "no"})

    infer, plain = partial(Measurement, "inference"), partial(Measurement, "inference", form="plain")
    srs = {"model": "srs", "batch_size": 8}
    published = plain(**srs, keeps_pages=False)
    peer, small_peer = (plain(PEER, image_size=size) for size in (1024, 384))
    for dtype, of_srs, of_opds in (("float32", 0.40, 0.30), ("bfloat16", 0.27, 0.15)):
        expect(f"srs, batch 8, {dtype}: time of the plain form", of_srs, infer(**srs, dtype=dtype), published)
        opds = infer("opds", image_size=1024, dtype=dtype)
        expect(f"opds, {dtype}: time of SegFormer-B2, pages kept for both", of_opds, opds, peer)
    expect("run: time of SegFormer-B2, pages kept for both", 1, infer("run", image_size=384), small_peer)
    expect("run at 1024x1024: peak memory, GiB", 4, infer("run", image_size=1024), key="peak_gib")
    for name, sides in GROWTH.items():
        network = partial(infer, name, image_size=DEFAULTS[name][0])
        expect(f"{name}: time of its ONNX file", 1.1, network(), network(form="onnx"))
        cases = (infer(name, image_size=side) for side in sides)
        expect(f"{name}, {sides[0]} to {sides[-1]}: growth of the time for a pixel", 1.25, *cases, key="ns_per_pixel")
    for task, limit in (("scan", 1 / 4), ("scan-training", 1 / 50)):
        cases = [Measurement(task, form=form, image_size=SCAN_SIDE) for form in ("torch", "loop")]
        expect(f"{OPERATORS[task]}: time of the loop", limit, *cases)
        expect(f"{OPERATORS[task]}: memory of the loop", 1 / 3, *cases, key="own_gib")
    for case in results:
        name = Path(case.model).stem
        if case.task == "path":
            expect(f"{name}: photos/s, share of the network's", 0.8, case, key="share_of_model", at_least=True)
        elif case.task == "start":
            expect("seconds from start to first mask", 6, case)
        elif case.task == "recipe":
            expect(f"{name}: rate of the loop, share of the network's", 0.9, case, key="loop_share", at_least=True)
            expect(f"{name}: share of the time that waits for data", 0.05, case, key="data_wait_share")
    for name, rate in (("srs", 800), ("run", 400), ("opds", 150)):
        case = infer(name, batch_size=8, image_size=DEFAULTS[name][0], dtype="bfloat16", device="cuda")
        expect(f"{name}, CUDA, batch 8, bfloat16: images/s", rate, case, key="images_per_second", at_least=True)
    return rows


def _record(title: str, report: dict, rows: list[dict]) -> dict:
    """Return a record of docs/results."""
    has = "with" if report["cpu_bfloat16"] else "without"
    hardware = f"{report['threads']} threads, {report['processor']} {has} bfloat16"
    return {
        "title": title,
        **dict.fromkeys(("network", "data", "split", "protocol", "recipe")),
        "command": report["command"],
        "commit": (report["git_commit"] or "")[:7],
        "date": report["date"][:10],
        "hardware": f"{report['accelerator'] or hardware}, torch {report['torch']}",
        "minutes": None,
        "numbers": rows,
        "notes": ["Measured with uncommitted changes."] if "dirty" in (report["git_commit"] or "") else [],
    }


def _write(path: Path, content: dict):
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
