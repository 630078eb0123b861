"""A notebook as a Markdown page with its saved outputs, and links between sources as links between pages."""
import posixpath
import re
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote

import nbformat
from markdown.extensions.toc import slugify_unicode

IMAGES = {".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp"}
CODE = r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)|`[^`\n]+`"
LINK = re.compile(CODE + r'|(?P<before>\]\(|(?:src|href)=")(?![a-z]+:|/)(?P<target>[^)\s"]+)', re.M | re.S)
OUTSIDE_IMAGE = re.compile(r"!\[([^\]]*)\]\(https?://[^)]*\)")
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
BAR = re.compile(r"(\d+%)\|[^|\n]*\|")


# Links

def as_html(page: str) -> str:
    "The path at which MkDocs writes a page."
    return re.sub(r"(^|/)README\.md$", r"\1index.md", page).removesuffix(".md") + ".html"


@dataclass
class Sources:
    "What links in the repository may lead to: pages, pictures, and all other files."
    root: Path                                # of the repository
    pages: dict[str, str]                     # path of a source: path of its page
    address: str                              # of the repository
    branch: str                               # that links to the repository name
    images: set = field(default_factory=set)  # pictures that some page shows

    def in_repository(self, path: str) -> str:
        "The address of a file or a folder of the repository."
        kind = "tree" if (self.root / path).is_dir() else "blob"
        return f"{self.address}/{kind}/{self.branch}/{path}"

    def link(self, source: str, target: str, raw: bool) -> str:
        "The relative link `target` of `source` as its page has it; in `raw` HTML, which MkDocs leaves alone, to HTML."
        path, _, heading = target.partition("#")
        anchor = f"#{slugify_unicode(unquote(heading), '-')}" if heading else ""
        if not path: return anchor
        folder = posixpath.dirname(source)
        full = posixpath.normpath(posixpath.join(folder, unquote(path)))
        if page := self.pages.get(full):
            return posixpath.relpath(as_html(page) if raw else page, folder or ".") + anchor
        if not (self.root / full).exists(): return target  # MkDocs will name it as broken
        if Path(full).suffix.lower() not in IMAGES: return self.in_repository(full)
        self.images.add(full)
        return target

    def relink(self, source: str, text: str) -> str:
        "Markdown of `source` with the links of its page; a picture from elsewhere becomes its description."
        def replace(m):
            if not m["target"]: return m[0]  # code
            return m["before"] + self.link(source, m["target"], raw=m["before"] != "](")
        return LINK.sub(replace, OUTSIDE_IMAGE.sub(r"\1", text))


# Notebooks

def fenced(text: str, kind: str) -> str:
    "A code block that nothing in `text` ends."
    longest = max(map(len, re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{kind}\n{text}\n{marks}"


def printed(output) -> str | None:
    "What a terminal would show of an output, progress bars in a word; None if there is something better to show."
    data = output.get("data", {})
    if data.keys() & {"text/html", "image/png", "text/markdown"}: return None
    if "application/javascript" in data: return ""
    text = output.get("text") or data.get("text/plain") or "\n".join(output.get("traceback", []))
    if "application/vnd.jupyter.widget-view+json" in data and BAR.search(text): return ""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in ANSI.sub("", text).strip("\n").split("\n")]
    return BAR.sub(r"\1", "\n".join(lines))


def shown(data: dict) -> str:
    "Markdown of an output that is more than text."
    if "text/html" in data:
        inner = data["text/html"].replace("`", "&#96;")  # in Markdown it could open a code block
        inner = re.sub(r"<table(?![^>]*\sclass=)", '<table class="own"', inner)  # it keeps its own style
        return f'<div class="output" markdown="0">{inner}</div>'
    if "image/png" in data:
        inner = f'<img alt="Figure" src="data:image/png;base64,{"".join(data["image/png"].split())}">'
        return f'<div class="output" markdown="0">{inner}</div>'
    return f'<div class="output" markdown="1">\n\n{data["text/markdown"]}\n\n</div>'


def outputs(cell) -> list[str]:
    "Markdown of a cell's outputs; what was printed in between stands in one block, a result in its own."
    blocks = []
    texts = [(printed(o), o) for o in cell.outputs]
    for kind, group in groupby(texts, key=lambda t: "rich" if t[0] is None else t[1].output_type == "execute_result"):
        if kind == "rich":
            blocks += [shown(output.data) for _, output in group]
            continue
        text = "\n".join(text for text, _ in group if text.strip())
        if text: blocks.append(fenced(text, " { .text .output .no-copy }"))
    return blocks


def code_cell(cell, module: str) -> list[str]:
    "Markdown of a code cell: hidden ones are left out, exported ones name the module that they become part of."
    directives = [" ".join(d.split()) for d in re.findall(r"^#\s*\|(.*)", cell.source, re.M)]
    if "hide" in directives: return []
    source = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    exported = module and any(d.split()[:1] == ["export"] for d in directives)
    title = f' title="{module}"' if exported else ""
    code = [fenced(source, f"python{title}")] if source and "echo: false" not in directives else []
    return code + outputs(cell)


def notebook_page(sources: Sources, source: str) -> str:
    "The notebook at `source` as a Markdown page."
    nb = nbformat.read(sources.root / source, as_version=4)
    code = "\n".join(c.source for c in nb.cells if c.cell_type == "code")
    name = re.search(r"^#\s*\|\s*default_exp\s+(\S+)", code, re.M)
    module = f"tinytrainer_nb/{name[1].replace('.', '/')}.py" if name else ""
    blocks = [f"---\nsource: {source}\n---"]
    for cell in nb.cells:
        if cell.cell_type == "markdown": blocks.append(sources.relink(source, cell.source))
        if cell.cell_type == "code": blocks += code_cell(cell, module)
    return "\n\n".join(blocks) + "\n"
