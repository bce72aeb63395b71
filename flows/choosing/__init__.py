"""A choice among variants of a recipe: which there are, what is found out about them, and the page of it."""
