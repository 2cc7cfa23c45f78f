"""From YAML and KEY=VALUE to a verb's dataclass. Only this folder uses Hydra."""
