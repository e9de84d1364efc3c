"""Networks, image processor and pipeline: the files that travel to the Hub.

All but `networks.py` travel with the weights, so they import only their siblings.
"""
