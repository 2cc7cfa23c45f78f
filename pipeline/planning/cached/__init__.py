"""What a cache will take before it is made: bytes, objects, requests and hours, in arithmetic."""
