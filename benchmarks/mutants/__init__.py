"""Whether a test fails where a line of the package is wrong."""
