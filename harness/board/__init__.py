"""A leaderboard as files: CSV, Markdown, LaTeX, pages, and the documents of which a script writes a part.

It may import scoring, records, config and interface. All names come from records that anyone may have sent, so each
format escapes them.
"""
