"""HOW tokens reach their experts and come back: pure functions, one file per way."""
