"""Ways of splitting the work, one file each, around the same loop and the same lanes."""
