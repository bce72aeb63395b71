"""The console: where people look at candidates and decide, in a browser, over the use cases that the command line calls."""
