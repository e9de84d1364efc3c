"""Check on a GPU what tests on a CPU leave out.

Each part runs in a process of its own with a time limit, and keeps the row of every check at once. The exit code is 1
if a check failed. What the machine lacks is named and skipped. A missed target of speed is shown, but is no failure.
"""

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unconceal.evaluation.cost import MODELS, Measurement, machine, measure, missing_mode
from unconceal.models import selective_scan as scan
from unconceal.utils.devices import choose_device, has_bfloat16
from unconceal.utils.errors import one_line, run_main
from unconceal.utils.files import make_folder
from unconceal.utils.markdown import markdown_table


ROOT = Path(__file__).resolve().parents[1]
# Seconds of each part at most; the last one takes what is left.
PARTS = {"tests": 130, "scan": 60, "parity": 80, "training": 90, "speed": 525}
TOTAL_SECONDS = 525
ROW = ("status", "check", "measured", "wanted")
SIZES = {"srs": 256, "run": 384, "run-pvtv2-b4": 384, "opds": 1024, "opds-single-head": 1024}
# Images per second that a large GPU should reach, by network and batch size.
TARGETS = {("opds", 8): 150, ("run", 8): 400, ("srs", 8): 800, ("srs", 16): 800}
# What each small recipe trains on: kind and size of the scenes.
SCENES = {"opds": ("intricate", 128), "run": ("camouflage", 64), "srs": ("ultrasound", 96)}


class Missing(Exception):
    """What the machine lacks."""


def need(*modules: str):
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise Missing(f"needs {', '.join(missing)}")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def check(args: argparse.Namespace, name: str) -> Iterator[dict]:
    """Print and keep one check; a failure stops no other."""
    row = {"part": args.part, "check": name, "status": "ok", "measured": "", "wanted": ""}
    start = time.perf_counter()
    try:
        yield row
    except Missing as error:
        row |= {"status": "skipped", "measured": str(error)}
    except Exception as error:
        traceback.print_exc()
        row |= {"status": "failed", "measured": f"{type(error).__name__}: {one_line(error)}"}
    keep(args, {**row, "seconds_of_check": round(time.perf_counter() - start, 1)})


def keep(args: argparse.Namespace, row: dict):
    print(" | ".join([row["part"], *(row[key] for key in ROW)]))
    with (args.out / "gpu_check.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def require(row: dict, is_right: bool):
    row["status"] = "ok" if is_right else "failed"


# ---- parts ----------------------------------------------------------------------------------------------------------


def run_tests(args: argparse.Namespace):
    """Run the tests marked `gpu`."""
    with check(args, "pytest -m gpu") as row:
        need("pytest")
        files = [path for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
        # Without `addopts`, the settings of a plugin that is not installed are no error. Each test is named at once:
        # if time runs out, the output still tells which ones failed.
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "gpu", "-vra"]
        if find_spec("xdist") and not args.quick:
            command += ["-n", "4"]
        with subprocess.Popen([*command, *sorted(files)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                print(line, end="")
        row |= {"measured": line.strip(" =\n"), "wanted": "no failure"}
        if process.returncode == 0 and " passed" not in line:
            raise Missing(row["measured"])
        require(row, process.returncode == 0)


def run_scan(args: argparse.Namespace):
    """Compare the backends of the selective scan with the plain loop."""
    sizes = {"width": 8, "states": 4} if args.quick else {"width": 128, "states": 16}
    dtypes, backends = (torch.float32, torch.bfloat16), ("torch", "triton", "mamba_ssm")
    for length, dtype in product((21,) if args.quick else (577, 9216), dtypes):
        inputs = scan_inputs(**sizes, length=length, dtype=dtype, device=args.device)
        expected = with_gradients(scan.selective_scan_ref, inputs)
        for backend in backends:
            with check(args, f"{backend}, length {length}, {name_of(dtype)}") as row:
                need_backend(backend, args.device)
                got = with_gradients(scan.selective_scan, inputs, backend=backend)
                errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True)]
                limit = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
                row["errors"] = dict(zip(("y", "x", "delta", "A", "B", "C", "D"), errors, strict=True))
                row |= {"measured": f"relative error {max(errors):.1e}", "wanted": f"at most {limit:.1e}"}
                require(row, all(error <= limit for error in errors))  # false for NaN
    for task, form in product(("scan", "scan-training"), ("loop", *backends)):
        size = {"image_size": 2, "steps": 1} if args.quick else {"image_size": 96}
        case = Measurement(task=task, form=form, device=str(args.device), **size)
        with check(args, f"{task}, {form}, length {case.image_size**2}") as row:
            if form != "loop":
                need_backend(form, args.device)
            row |= measure(case)
            row["measured"] = f"{1000 * row['seconds']:.2f} ms, {row['own_gib']:.2f} GiB"


def need_backend(backend: str, device: torch.device):
    kernels = {"triton": scan.selective_scan_triton, "mamba_ssm": scan.selective_scan_fn}
    if kernels.get(backend, True) is None:
        raise Missing(f"needs {backend}")
    if device.type == "cpu" and not (backend == "torch" or backend == "triton" and os.getenv("TRITON_INTERPRET")):
        raise Missing("needs CUDA")


def scan_inputs(width: int, states: int, length: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return random inputs of a scan with four groups."""
    generator = torch.Generator().manual_seed(0)
    x, delta, B, C, D = (
        torch.randn(shape, generator=generator)
        for shape in [(1, 4 * width, length)] * 2 + [(1, 4, states, length)] * 2 + [(4 * width,)]
    )
    A = -torch.arange(1.0, states + 1).repeat(4 * width, 1)
    inputs = (x.to(dtype), F.softplus(delta - 3).to(dtype), A, B.to(dtype), C.to(dtype), D)
    return [z.to(device).requires_grad_() for z in inputs]


def with_gradients(function: Callable, inputs: list[Tensor], **options) -> list[Tensor]:
    """Return the result and its gradients for a fixed random weight."""
    y = function(*inputs, **options)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [z.float() for z in (y.detach(), *torch.autograd.grad(y, inputs, weight))]


@torch.inference_mode()
def run_parity(args: argparse.Namespace):
    """Compare number types with the network in float64.

    A random network amplifies every rounding. The yardsticks are the network in float32, and for half precision that
    network with rounded weights and image. An inference form also rounds its activations.
    """
    torch.backends.cudnn.allow_tf32 = False
    for name in ("srs", "run", "opds") if args.quick else SIZES:
        torch.manual_seed(0)
        size = 64 if args.quick else SIZES[name]
        pixel_values = torch.randn(2, 3, size, size).to(args.device)
        network = MODELS[name]().to(args.device).eval()
        fit_batch_norms(network, pixel_values)
        exact = predict(copy.deepcopy(network).double(), pixel_values)

        def yardstick(dtype: torch.dtype, network=network, pixel_values=pixel_values, exact=exact) -> float:
            rounded = copy.deepcopy(network).to(dtype).float()
            return mean_difference(predict(rounded, pixel_values.to(dtype)), exact)

        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with check(args, f"{name}, inference form in {name_of(dtype)}") as row:
                if dtype == torch.bfloat16 and not has_bfloat16(args.device):
                    raise Missing(f"{args.device} has no bfloat16 of its own")
                compare(row, predict(network.for_inference(dtype), pixel_values), exact, yardstick(dtype))
        for title, device, allows_tf32, dtype in (
            ("float32 with TF32", args.device, True, torch.float16),  # both keep 11 bits
            ("float32 on the CPU", "cpu", False, torch.float32),
        ):
            with check(args, f"{name}, {title}") as row:
                if args.device.type == "cpu":
                    raise Missing("needs CUDA")
                limit = yardstick(dtype)
                torch.backends.cudnn.allow_tf32 = allows_tf32
                masks = predict(network.to(device), pixel_values.to(device)).to(args.device)
                compare(row, masks, exact, limit)
            torch.backends.cudnn.allow_tf32 = False


def fit_batch_norms(network: nn.Module, pixel_values: Tensor):
    """Give batch norms the statistics of a batch."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over batches
            module.train()
    network(pixel_values=pixel_values)
    network.eval()


def predict(network: nn.Module, pixel_values: Tensor) -> Tensor:
    return network(pixel_values=pixel_values.to(network.dtype)).logits.double().sigmoid()


def mean_difference(masks: Tensor, exact: Tensor) -> float:
    return (masks - exact).abs().mean().item()


def compare(row: dict, masks: Tensor, exact: Tensor, yardstick: float):
    largest, mean, limit = (masks - exact).abs().max().item(), mean_difference(masks, exact), max(1e-6, 8 * yardstick)
    row |= {"largest": largest, "mean": mean, "limit": limit}
    row |= {"measured": f"masks differ by {largest:.1e}, by {mean:.1e} on average"}
    row |= {"wanted": f"at most {limit:.1e} on average"}
    require(row, mean <= limit)  # false for NaN


def run_training(args: argparse.Namespace):
    """Train the small recipes; compare the losses of number types."""
    with check(args, "libraries"):
        need("datasets", "omegaconf", "py_sod_metrics", "skimage", "tensorboard")
        from unconceal.data.builders import build_synthetic
        from unconceal.training.loop import train
        from unconceal.training.recipe import load_recipe
    if "load_recipe" not in locals():
        return
    from accelerate.state import AcceleratorState

    counts, epochs = ({"train": 8, "val": 2}, 1) if args.quick else ({"train": 64, "val": 8}, 3)
    for network in ("srs",) if args.quick else SCENES:
        kind, size = SCENES[network]
        with TemporaryDirectory() as folder:
            build_synthetic(kind, f"{folder}/data", counts, size=size)
            exact = None
            for precision in ("no", "bf16", "fp16"):
                with check(args, f"{network}, {precision}") as row:
                    if precision == "fp16" and args.device.type == "cpu":
                        raise Missing("needs CUDA")
                    # Accelerate fixes the number type of a process once.
                    AcceleratorState._reset_state(reset_partial_state=True)
                    settings = [f"data.path={folder}/data", "data.num_workers=0", f"mixed_precision='{precision}'"]
                    settings += [f"output_dir={folder}/{precision}", f"phases.segmentation.epochs={epochs}"]
                    recipe = load_recipe(ROOT / f"configs/{network}/smoke.yaml", settings)
                    last = train(recipe).parent / "last" / "progress.json"
                    losses = [epoch["train_loss"] for epoch in json.loads(last.read_text())["history"]]
                    exact = exact or losses
                    row |= {"losses": losses, "measured": " ".join(f"{loss:.4f}" for loss in losses)}
                    row["wanted"] = "the last within 10 % of float32, lower than the first"
                    is_lower = losses[-1] < losses[0] or epochs == 1
                    require(row, is_lower and abs(losses[-1] - exact[-1]) <= 0.1 * exact[-1])


def run_speed(args: argparse.Namespace):
    """Measure images per second in bfloat16."""

    def case(model: str, batch_size: int, **options) -> Measurement:
        size = 64 if args.quick else SIZES[model]
        shared = {
            "image_size": size,
            "dtype": "bfloat16",
            "device": str(args.device),
            "steps": 1 if args.quick else 10,
        }
        return Measurement(model=model, batch_size=batch_size, **shared, **options)

    cases = [case("srs", 8), case("srs", 8, task="training", form="channels_last")]
    if not args.quick:
        cases += [
            case("srs", 16),
            case("run", 8),
            case("run-pvtv2-b4", 8),
            case("opds", 8),
            case("opds-single-head", 8),
        ]
        cases += [case(model, 4, task="training", form="channels_last") for model in ("run", "opds")]
        cases += [case(*network, form="compiled") for network in TARGETS]
    for one in cases:
        measure_speed(args, one, "")
    scan.BACKEND = "triton"
    measure_speed(args, case("run", 1 if args.quick else 8), ", scan by triton")


def measure_speed(args: argparse.Namespace, case: Measurement, note: str):
    size = f"{case.model} {case.image_size}x{case.image_size}, batch {case.batch_size}"
    with check(args, f"{size}, {case.task}, {case.form}{note}") as row:
        if reason := missing_mode(case):
            raise Missing(reason)
        if note:
            need_backend(scan.BACKEND, args.device)
        row |= measure(case)
        speed, first = row["images_per_second"], row["first_seconds"]
        row["measured"] = f"{speed:.1f} images/s, {row['own_gib']:.2f} GiB, first call {first:.1f} s"
        target = TARGETS.get((case.model, case.batch_size))
        if target and case.task == "inference" and not args.quick:
            row |= {"wanted": f"at least {target} images/s", "status": "ok" if speed >= target else "missed"}


# ---- the whole ------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("gpu_check"), help="folder for the results")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu with --quick tries the script (cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (all)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # run it in this process
    args = parser.parse_args()
    args.device = choose_device(args.device)
    return args


def run_part(args: argparse.Namespace, seconds: float | None):
    """Run a part in its own process group; stop it in time."""
    command = [sys.executable, __file__, str(args.out), "--device", str(args.device), "--part", args.part]
    environment = {**os.environ}
    if args.device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # training would use a GPU
        if args.part == "scan":
            environment["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(command + ["--quick"] * args.quick, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
        reason = f"the process ended with code {code}" if code else None
    except subprocess.TimeoutExpired:
        reason = f"stopped after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if reason:
        keep(args, {"part": args.part, "check": "all", "status": "failed", "measured": reason, "wanted": "to the end"})


def main() -> int:
    args = parse_arguments()
    if args.part:
        globals()[f"run_{args.part}"](args)
        return 0
    make_folder(args.out)
    args.out = args.out.resolve()
    lines = args.out / "gpu_check.jsonl"
    lines.write_text("")
    start = time.monotonic()
    for part in args.parts:
        args.part = part
        left = TOTAL_SECONDS - (time.monotonic() - start)
        run_part(args, None if args.quick else max(1, min(PARTS[part], left)))
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), **machine()}
    facts |= {"quick": args.quick, "seconds": round(time.monotonic() - start)}
    (args.out / "gpu_check.json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    lines.unlink()
    text = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    for part in args.parts:
        cells = [[row[key] for key in ROW] for row in rows if row["part"] == part]
        text += f"\n\n## {part}\n\n{markdown_table(ROW, cells)}"
    (args.out / "gpu_check.md").write_text(f"# GPU check\n\n{text}\n", encoding="utf-8")
    print(f"\n{text}\n\nwrote {args.out}")
    return int(any(row["status"] == "failed" for row in rows))


def commit() -> str | None:
    try:
        from unconceal.utils.commits import git_commit
    except ImportError:
        return None
    return git_commit()


if __name__ == "__main__":
    run_main(main)
