"""Objects by URL: a local path or s3://."""
