"""The things that are measured, a module each. Each has one `measure` that returns the lines of the table."""
