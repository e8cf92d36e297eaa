"""Numbers from predictions: pure functions, no model, no files."""
