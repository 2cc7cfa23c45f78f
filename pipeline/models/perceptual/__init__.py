"""How different two pictures look, by the features of a network that was trained on photos."""
