"""Speed against peers, each ratio measured in one run on one machine (docs/measured/cpu.md)."""
