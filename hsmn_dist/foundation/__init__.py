"""Words and tools that every room shares; standard library alone."""
