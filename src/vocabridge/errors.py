"""The one exception for what a user wrote wrong."""


class UserError(ValueError):
    """A recipe, data file, tokenizer or model cannot be used as given.

    The message is one sentence (or a few short ones): what is wrong, where (file, line, field), how to mend it. The
    command line prints it without a traceback and exits with 2; what *we* broke stays an ordinary exception.
    """


def visible(text: str) -> str:
    r"""The text in one line, with an escape for each character that a terminal would act on or not show.

    >>> print(visible("two\nlines, \x1b[31mred"))
    two\nlines, \x1b[31mred
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def one_line(error: BaseException) -> str:
    """A library's message without line breaks, cut to 400 characters; of an error without one its type's name."""
    return " ".join(str(error).split())[:400] or type(error).__name__
