"""What `make mutants` breaks, and how."""
