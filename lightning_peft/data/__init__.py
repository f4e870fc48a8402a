"""Data modules: where texts and labels come from."""
