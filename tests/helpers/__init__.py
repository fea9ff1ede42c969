"""Models, commands and processes that several test files use."""
