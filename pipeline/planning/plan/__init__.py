"""What a run will cost, before it is paid: figures with their basis, of encoding, training and evaluations."""
