"""The one exception for what a user wrote wrong."""


class UserError(ValueError):
    """A recipe, data file, tokenizer or model cannot be used as given.

    The message is one sentence (or a few short ones): what is wrong, where (file, line, field), how to mend it. The
    command line prints it without a traceback and exits with 2; what *we* broke stays an ordinary exception.
    """
