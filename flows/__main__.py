"""python -m flows is `visionloop`."""

from flows.cli import main

main()
