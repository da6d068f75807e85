"""WHO goes where: pure functions over the arrays of one group of tokens."""
