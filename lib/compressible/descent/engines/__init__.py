"""What takes the steps: a readable reference, and the fast engines for CPU and CUDA that are tested against it."""
