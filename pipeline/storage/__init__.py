"""Storage of objects under a URL: a local folder or s3://."""
