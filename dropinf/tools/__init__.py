"""What people run: the demo, the doctor, the microbenchmark."""
