# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""Pages of the documentation site that lie outside docs/, and links to them. A hook of MkDocs (mkdocs.yml).

Every file of the repository has one place on the site, `site_path`. README.md is the start page, each bundle's README and
each notebook is a page, and any other file that a page links to is shown as it is. So links are written as the code host
wants them, relative to the file, and `on_page_markdown` turns them to the site. MkDocs checks them there.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "zoo/released/README.md": "released-models.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".cfg": "ini"}
FENCE = re.compile(r"^(```+).*?^\1 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?:\]\(|^\[[^\]\n]+\]: )([^()\s]+)", re.MULTILINE)  # in the text, or a definition of its own
ELSEWHERE = re.compile(r"[a-z]+:|#|/")


def site_path(path: str) -> str:
    """Return the place on the site of a file of the repository.

    Args:
        path: path of the file, from the repository's root.
    """
    if path in TOP_PAGES:
        return TOP_PAGES[path]
    if bundle := re.fullmatch(r"bundles/(\w+)/docs/README\.md", path):
        return f"bundles/{bundle[1]}.md"
    if model := re.fullmatch(r"zoo/released/(\w+)\.md", path):
        return f"released/{model[1]}.md"
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return f"source/{path}.md"


def links(markdown: str, path: str) -> list[tuple[re.Match, str, str]]:
    """Return the relative links of a text outside its code blocks.

    Args:
        markdown: the text.
        path: path of its file, from the repository's root.

    Returns:
        For each link its match, the path of its target from the repository's root, and its anchor.
    """
    code = [match.span() for match in FENCE.finditer(markdown)]
    found = []
    for match in LINK.finditer(markdown):
        inside = any(start <= match.start() < end for start, end in code)
        if not inside and not ELSEWHERE.match(match[1]):
            target, _, anchor = match[1].partition("#")
            found.append((match, os.path.normpath(os.path.join(os.path.dirname(path), target)), anchor))
    return found


def turn_links(markdown: str, path: str) -> str:
    """Return a text with its relative links turned to the site. Those without a file stay, and MkDocs refuses them.

    Args:
        markdown: the text.
        path: path of its file, from the repository's root.
    """
    page = os.path.dirname(site_path(path))
    for match, target, anchor in reversed(links(markdown, path)):
        if (ROOT / target).is_file():
            link = os.path.relpath(site_path(target), page or ".") + (f"#{anchor}" if anchor else "")
            markdown = markdown[: match.start(1)] + link + markdown[match.end(1) :]
    return markdown


def notebook_text(path: Path) -> str:
    """Return the Markdown of a notebook: its texts, its code and the outputs that it was saved with."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        bash = source.startswith("%%bash\n")
        parts.append(f"```{'bash' if bash else 'python'}\n{source.removeprefix('%%bash').strip()}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", [])))
            if "image/png" in data:
                image = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="Picture that the code above draws" src="data:image/png;base64,{image}">')
            elif text.strip():
                parts.append(f"```text\n{text.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def text_of(path: str) -> str:
    """Return the Markdown of a file of the repository, with its own links."""
    file = ROOT / path
    if file.suffix == ".ipynb":
        return notebook_text(file)
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    language = LANGUAGES.get(file.suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n# {file.name}\n\n`{path}`\n\n````{language}\n{text}\n````\n"


@cache
def pages() -> dict[str, str]:
    """Return all pages of the site: their places, and the files of the repository that they show."""
    todo = [
        *TOP_PAGES,
        *(file.relative_to(ROOT).as_posix() for file in sorted(ROOT.glob("bundles/*/docs/README.md"))),
        *(file.relative_to(ROOT).as_posix() for suffix in ("md", "ipynb") for file in ROOT.glob(f"docs/**/*.{suffix}")),
    ]
    found: dict[str, str] = {}
    while todo:
        path = todo.pop()
        if site_path(path) in found:
            continue
        found[site_path(path)] = path
        if path.endswith((".md", ".ipynb")):
            targets = [target for _, target, _ in links(text_of(path), path) if (ROOT / target).is_file()]
            todo += [target for target in targets if site_path(target).endswith(".md")]
    return found


def anchor(heading: str, separator: str = "-") -> str:
    """Return the anchor of a heading as code hosts make it, so that a link holds there and on the site."""
    return re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", separator)


def on_config(config):
    """Give headings the anchors of code hosts."""
    config.mdx_configs["toc"]["slugify"] = anchor
    return config


def on_files(files, config):
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    pages.cache_clear()  # `mkdocs serve` builds again and again
    for place, path in pages().items():
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, content=text_of(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn the links of a page to the site."""
    path = pages()[page.file.src_uri]
    if page.file.src_uri.startswith("source/"):
        return markdown
    if path == "README.md":
        page.meta["hide"] = ["navigation"]  # its column would repeat the tabs
    if bundle := re.fullmatch(
        r"bundles/(\w+)\.md", page.file.src_uri
    ):  # the model zoo requires one heading in all of them
        markdown = markdown.replace("# Model Overview\n", f"# {bundle[1]}\n", 1)
    markdown = turn_links(markdown, path)
    if path.endswith(".ipynb"):
        markdown += f"\n[Download this notebook]({os.path.basename(path)})\n"
    return markdown
