"""Measures what skipbus promises of its speed, and says for each figure whether the promise is kept (`make bench`)."""
