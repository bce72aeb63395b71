"""The flows, the command line and the run: the only Prefect code. `flows/train.py` is the map of the product.

Every process of ours begins here, or is started by one that did: its environment is quiet before a library is imported.
"""

from flows.quiet import quieten

quieten()
