"""The settings of a config.json, each read with its type and its range."""

import reprlib
from collections.abc import Mapping
from typing import Any

from rl_jax.errors import InputError

Settings = Mapping[str, Any]
MOST = 2**31 - 1  # of any size: tokens and positions are int32


def size(settings: Settings, name: str, default: int | None = None, least: int = 1) -> int:
    """A whole number from `least` to `MOST`; without a default the setting must be there."""
    value = settings[name] if default is None else settings.get(name)
    value = default if value is None else value
    if type(value) is not int or not least <= value <= MOST:
        raise wrong(name, value, f"a whole number from {least} to {MOST}")
    return value


def positive(settings: Settings, name: str, default: float | None = None, null: float | None = None) -> float:
    """A positive number of float32; without a default the setting must be there. `null` is what null stands for."""
    if null is not None and settings.get(name, default) in (None, null):
        return null
    value = settings[name] if default is None else settings.get(name, default)
    if type(value) not in (int, float) or not 0 < value < 1e38:
        raise wrong(name, value, "a positive number")
    return float(value)


def truth(settings: Settings, name: str, default: bool) -> bool:
    """True or false."""
    value = settings.get(name, default)
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def require(settings: Settings, name: str, *values: Any) -> None:
    """InputError where the setting is there and is none of the values."""
    if name in settings and settings[name] not in values:
        shown, wanted = reprlib.repr(settings[name]), " or ".join(map(repr, values))
        raise InputError(f"Models with {name} = {shown} are not supported; only {wanted} is.")


def wrong(name: str, value: Any, wanted: str) -> InputError:
    """The error of a setting that is not what it must be."""
    shown = reprlib.repr(value)
    return InputError(f"The model's config.json has {name} = {shown}; it must be {wanted}: copy or train it again.")
