"""Numbers and foreign text in words."""


def printable(text: str) -> str:
    """Text of unknown origin (class names, file names) with control characters made visible, for a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: float) -> str:
    """A duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(per_s: float | None) -> str:
    """A rate, three digits of it and no exponent: 0.32, 12.5, 2,120; "-" where it is not known."""
    if per_s is None:
        return "-"
    return f"{float(f'{per_s:.3g}'):,.0f}" if per_s >= 1000 else f"{per_s:.3g}"
