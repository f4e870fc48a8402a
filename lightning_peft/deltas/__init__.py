"""What several methods share: one mechanism, one file."""
