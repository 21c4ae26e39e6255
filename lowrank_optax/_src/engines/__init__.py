"""The engines, which run a method's parts over a tree of parameters."""
