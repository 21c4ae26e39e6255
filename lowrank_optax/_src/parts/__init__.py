"""The parts of methods, and their laws."""
