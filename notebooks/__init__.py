"""Notebooks: each a Python file in jupytext's percent format, and what it put out."""
