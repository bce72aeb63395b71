"""Where things lie: the workspace, its settings, recipes, data, registry and backup."""
