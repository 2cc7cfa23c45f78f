"""What a single value may be: bounds, rules on metadata, time limits."""
