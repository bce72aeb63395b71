"""A search of recipes: its space, its study, its trials, and who trains them."""
