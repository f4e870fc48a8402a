"""What is done with trained weights: scaled, combined, folded into the base."""
