"""YAML and KEY=VALUE to a verb's dataclass; the only room of Hydra beside sweeps."""
