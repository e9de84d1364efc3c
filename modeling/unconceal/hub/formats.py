"""Formats of an export, light to import for `--help`."""

FORMATS = {"onnx": "model.onnx", "torch-export": "model.pt2"}  # format -> file in the export's folder
OPSET, LEAST_OPSET, LAST_OPSET = 20, 18, 23  # ONNX's operator set: the default, the first and last that torch writes
