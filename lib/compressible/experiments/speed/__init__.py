"""What times engines and their peers, and what the machine allows at most."""
