"""What images are given besides their conditioning: pictures to begin from, regions to keep and guides."""
