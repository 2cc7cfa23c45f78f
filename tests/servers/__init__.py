"""Real servers, which tests use over loopback."""
