"""Where a model keeps what methods change, found by structure and not by a list of model names."""
