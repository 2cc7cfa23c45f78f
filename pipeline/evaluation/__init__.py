"""How good the samples are: features, metrics, the pixel judge, and the verb that runs them."""
