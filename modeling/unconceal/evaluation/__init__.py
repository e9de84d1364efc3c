"""Score masks: one module a protocol, and the code that runs protocols.

The docstring of `protocol_NAME.py` is the written protocol. Import names from the modules:

| module | |
|---|---|
| `protocols` | `PROTOCOLS`, all protocols by name |
| `networks` | `evaluate_model` scores a network |
| `mask_files` | `PredictionFolder` scores mask files of any method |
| `report` | `write_report` keeps the numbers |
| `tables` | `make_tables` compares results with each other and with papers |
"""
