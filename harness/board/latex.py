"""A leaderboard as a LaTeX table: leaderboard.tex."""

from __future__ import annotations

from harness.board.formats import format_interval, format_number, format_ranks, format_speedup
from harness.scoring.leaderboard import Leaderboard

_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def format_latex(board: Leaderboard, title: str) -> str:
    """A tabular of the scores, for the package booktabs; title: of the comment above it."""
    headings = ["Rank", "Submission", "Score", "By steps", f"Speed-up over {escape(board.baseline or 'no baseline')}"]
    rows = [
        [
            format_ranks(row),
            escape(row["submission"]),
            format_interval(row, "score", 3),
            format_number(row["steps_score"], 3),
            "no number" if row["speedup_reading"] == "none" else format_speedup(row),
        ]
        for _, row in board.scores.iterrows()
    ]
    # On one line, since what follows a line break would be outside the comment.
    lines = [f"% {' '.join(title.split())}", r"\begin{tabular}{llrrr}", r"\toprule"]
    for number, cells in enumerate([headings, *rows]):
        # After `escape`, which would make text of the dollar signs.
        line = " & ".join(cell.replace("–", "--").replace("∞", r"$\infty$") for cell in cells)
        lines += [line + r" \\"] + [r"\midrule"] * (number == 0)
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def escape(text: str) -> str:
    """Any text as LaTeX that shows it, on one line."""
    # Character by character: one replacement after another would escape the backslashes and braces of the earlier ones.
    return "".join(_ESCAPES.get(c, c) for c in " ".join(str(text).split()))
