"""Flags that are taken out of a command line before its options are read."""


def take_value(arguments: list[str], flag: str) -> tuple[list[str], str | None]:
    """Takes `flag VALUE` or `flag=VALUE` out of the arguments; the last value counts, None is no such flag."""
    rest, value, words = [], None, iter(arguments)
    for word in words:
        name, equals, behind = word.partition("=")
        if name == flag:
            value = behind if equals else next(words, "")
        else:
            rest.append(word)
    return rest, value
