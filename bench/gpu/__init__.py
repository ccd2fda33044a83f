"""`make gpu`: tests, sanitizers, benchmarks and whole models on a machine with a GPU."""
