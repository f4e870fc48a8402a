"""Several adapters on one base: what each has, and which of them act."""
