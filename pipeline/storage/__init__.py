"""Storage of objects under a URL: a local folder, s3://, gs:// or az://."""
