"""What every room stands on: the error a user sees, files that are whole or absent, JSON.

Imports nothing of the project.
"""

from .errors import InputError, RankError, SaidElsewhere, one_line
from .files import whole_file, write_text
from .json import to_json

__all__ = [
    "InputError",
    "RankError",
    "SaidElsewhere",
    "one_line",
    "to_json",
    "whole_file",
    "write_text",
]
