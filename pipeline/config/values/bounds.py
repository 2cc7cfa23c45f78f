"""Single values of a configuration that are out of their range, each refused with one line."""

from __future__ import annotations

from pipeline.errors import ConfigError


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with the message unless it holds."""
    if not holds:
        raise ConfigError(message)


def at_least(least: int, **values: int) -> None:
    """Raise ConfigError for the first value, by its name as given (model.channels), below `least`."""
    for name, value in values.items():
        require(value >= least, f"{name}={value}: {least} or more is wanted")


def fraction(name: str, value: float) -> None:
    """Raise ConfigError unless 0 <= value <= 1."""
    require(0 <= value <= 1, f"{name}={value:g}: a number from 0 to 1 is wanted")


def some_text(name: str, value: str, what: str) -> None:
    """Raise ConfigError where a text that must be given is empty; what: what it should name."""
    require(value.strip() != "", f"{name} is missing: give {name}=... ({what})")
