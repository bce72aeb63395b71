"""The flows, the command line and the run: the only Prefect code. `flows/train.py` is the map of the product."""
