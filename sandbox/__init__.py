"""Private servers and whole key providers as processes, for the demo, the tests and the bench."""
