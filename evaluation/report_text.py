"""Formats text for the report: escaped names, and numbers with units."""

import html
import re
from datetime import datetime
from pathlib import Path


def printable(text: object) -> str:
    """Escapes bytes that are not UTF-8, control characters, and changes of the writing direction in `text`."""
    return re.sub(
        "[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
        lambda match: _escape_sequence(ord(match[0])),
        str(text),
    )


def _escape_sequence(code: int) -> str:
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code  # a byte that Python decoded as a surrogate
    return f"\\x{byte:02x}" if byte < 256 else f"\\u{code:04x}"


def escape(text: object) -> str:
    """Returns `text` as HTML."""
    return html.escape(printable(text))


def file_name(path: str) -> str:
    """Returns the last part of `path` as HTML."""
    return escape(Path(path).name)


def percent(share: float | None, digits: int = 1) -> str:
    """Formats a share in percent as HTML, None as a dash."""
    return "&ndash;" if share is None else f"{100 * share:.{digits}f}&#8239;%"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Formats a count: 1 video, 2,000 videos."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def date(text: str) -> str:
    """Spells out an ISO date as HTML; other text is only escaped."""
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return escape(text)
    zone = f" {parsed.tzname()}" if parsed.tzinfo else ""
    return f'<time datetime="{escape(text)}">{parsed.day} {parsed:%B %Y, %H:%M}{zone}</time>'


def duration(seconds: float) -> str:
    """Formats a duration in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {whole_seconds} s"
