"""From YAML and KEY=VALUE to a verb's dataclass. Besides sweeps, only this folder uses Hydra."""
