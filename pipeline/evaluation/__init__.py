"""How good samples are: features, metrics, the pixel judge, and the evaluation that runs them."""
