"""Commands of `unconceal`, one module each.

A module offers `add_arguments(parser)` and `run(args)`. `add_arguments` also runs for `--help`, so it imports nothing
heavy. `run` imports what the command needs and returns the exit code, None for 0.
"""

# Module name, and its line in `unconceal --help`.
COMMANDS = {
    "segment": "write masks, overlays or cut-outs of images",
    "explain": "draw how RUN finds its mask, stage by stage",
    "train": "train a network from a recipe",
    "evaluate": "score a model or mask files; compare results",
    "prepare": "build a data set from raw files, or generate one",
    "models": "list the trained networks that ship with this package",
    "push": "send a model, a data set or a Space to the Hub",
    "export": "write a model as ONNX or torch.export",
    "convert": "convert checkpoints that a paper's authors published",
    "benchmark": "measure time, memory and multiply-adds",
}
