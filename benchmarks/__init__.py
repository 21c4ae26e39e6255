"""Measurements; each module prints and records one."""
