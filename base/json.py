"""JSON that every parser reads."""

import json
import math


def to_json(value, **style):
    """The value as JSON text; NaN and infinity, which JSON does not have, become null.

    style: what json.dumps takes.
    """
    return json.dumps(finite(value), **style)


def finite(value):
    """The same value with None in place of every float that is not finite; tuples become lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
