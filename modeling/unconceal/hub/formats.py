"""Formats of an export, light to import for `--help`."""

FORMATS = {"onnx": "model.onnx", "torch-export": "model.pt2"}
"""Format -> file in the export's folder."""
OPSET, LEAST_OPSET, LAST_OPSET = 20, 18, 23
"""Versions of ONNX's operator set that torch's exporter writes: the default, the first and the last."""
