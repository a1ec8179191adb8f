"""What is recovered and how it starts: problems, factors, compression, spectra, synthetic data, least squares."""
