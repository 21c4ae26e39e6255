"""What a transformation costs and does, for people to read."""
