"""A document as Markdown, LaTeX and HTML."""

from html import escape

from medmask.evaluation.tables import Document, Grid

TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "|": r"\textbar{}", "±": r"$\pm$", "\u2013": "--", "\n": " ",
    }
)  # fmt: skip
MARKDOWN = str.maketrans({"|": r"\|", "<": "&lt;", ">": "&gt;", "*": r"\*", "`": r"\`", "\\": r"\\", "\n": " "})
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 75rem; color: #222;
       background: #fff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; border-top: 2px solid #222; border-bottom: 2px solid #222; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { padding: 0.3rem 0.8rem; text-align: left; vertical-align: top; font-variant-numeric: tabular-nums; }
thead th { border-bottom: 1px solid #222; }
tbody th { font-weight: 500; }
tbody tr:nth-child(even) { background: #f4f4f4; }
.failed { color: #a03000; }
ol { font-size: 0.9rem; color: #444; }
"""


def to_markdown(document: Document) -> str:
    """GitHub-flavoured Markdown with a numbered list of footnotes."""
    parts = [f"# {plain(document.title)}", plain(document.intro)]
    for grid in document.grids:
        rows = [grid.header, ["---"] * len(grid.header), *([plain(text) for text in row] for row in grid.rows)]
        parts += [f"**{plain(grid.caption)}**", "\n".join("| " + " | ".join(row) + " |" for row in rows)]
    parts.append("\n".join(f"{i}. {plain(note)}" for i, note in enumerate(document.notes, 1)))
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    return text.translate(MARKDOWN)


def to_tex(document: Document) -> str:
    """LaTeX tables in the style of booktabs, to be read with `\\input`."""
    parts = ["% needs \\usepackage{booktabs} and UTF-8 input"]
    parts += [tex_grid(grid, document) for grid in document.grids]
    notes = "\n".join(f"  \\item {note.translate(TEX)}" for note in document.notes)
    parts.append(f"\\begin{{enumerate}}\\footnotesize\n{notes}\n\\end{{enumerate}}")
    return "\n\n".join(parts) + "\n"


def tex_grid(grid: Grid, document: Document) -> str:
    def line(texts: list[str]) -> str:
        # braces keep a leading bracket from being read as the optional argument of the line end before it
        return "    " + " & ".join(text.translate(TEX) for text in texts).replace("[", "{[}") + r" \\"

    caption = f"{document.title}. {grid.caption}: {document.intro}." if grid.caption == "Result" else grid.caption
    body = "\n".join(line(row) for row in grid.rows)
    return (
        "\\begin{table}\n  \\centering\\footnotesize\n"
        f"  \\caption{{{caption.translate(TEX)}}}\n  \\begin{{tabular}}{{{'l' * len(grid.header)}}}\n"
        f"    \\toprule\n{line(grid.header)}\n    \\midrule\n{body}\n    \\bottomrule\n"
        "  \\end{tabular}\n\\end{table}"
    )


def to_html(document: Document) -> str:
    """One page without scripts or anything from outside."""
    grids = "\n".join(html_grid(grid) for grid in document.grids)
    notes = "\n".join(f"<li>{escape(note)}</li>" for note in document.notes)
    title = escape(document.title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n<p>{escape(document.intro)}</p>\n{grids}\n<ol>\n{notes}\n</ol>\n</body>\n</html>\n"
    )


def html_grid(grid: Grid) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in grid.header)
    rows = []
    for name, *texts in grid.rows:
        marks = [' class="failed"' if text.startswith("failed") else "" for text in texts]
        fields = "".join(f"<td{mark}>{escape(text)}</td>" for mark, text in zip(marks, texts, strict=True))
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{fields}</tr>')
    body = "\n".join(rows)
    return (
        f'<div class="wide"><table>\n<caption>{escape(grid.caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )
