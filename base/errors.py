"""The one error that a user is meant to see, and errors of others in a line."""


class InputError(ValueError):
    """Something the user can put right.

    The message is one line: what is wrong, where, what was expected, what to do. Programs print it
    after "error: " and exit with status 2.
    """


class RankError(InputError):
    """One that is of a single process among others, which says it itself, whatever its rank."""


class SaidElsewhere(InputError):
    """One that another process has met, and says: there is nothing more to say."""


def one_line(said, most=None):
    """What an error or a text says in one line, of at most so many characters."""
    return " ".join(str(said).split())[:most]
