"""Tables for people and for papers."""

from collections.abc import Iterable


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    header = list(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        # After the `\\` of the line before, these would be its arguments.
        "[": "{[}",
        "*": "{*}",
        # Signs of our tables that not every font and engine has as they are.
        "±": r"$\pm$",
        "–": "--",
        "†": r"\textdagger{}",
        "‡": r"\textdaggerdbl{}",
        "§": r"\S{}",
        "¶": r"\P{}",
    }
)


def escape_latex(text: str) -> str:
    """Return text that LaTeX sets as it reads here."""
    return text.translate(_LATEX)


def latex_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a LaTeX `tabular` in the style of the package booktabs, from cells of plain text."""
    header = list(header)
    titles, *lines = (" & ".join(map(escape_latex, cells)) + r" \\" for cells in (header, *rows))
    begin = rf"\begin{{tabular}}{{l{'c' * (len(header) - 1)}}}"
    return "\n".join((begin, r"\toprule", titles, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"))
