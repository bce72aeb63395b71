"""One training run: the workspace it holds, its stages, and what it leaves behind."""
