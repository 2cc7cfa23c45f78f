"""What a single value may be: bounds, conditions on columns, times."""
