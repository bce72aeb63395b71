"""Figures and templates of the pages."""
