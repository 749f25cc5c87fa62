"""Make links of docs/ to other files of the clone work in the site (a hook of mkdocs.yml).

On disk a page links to ../results/e2e.json or ../CONTRIBUTING.md. The site has a copy of each such file under repository/. Links
between pages stay as they are. A link to a folder has no page to go to, and becomes its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
COPIES = "repository"
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add each file that a page links to, and those that these link to."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    waiting += [uri for uri in pages(config.nav) if uri.startswith(f"{COPIES}/")]
    seen: set[str] = set()
    while waiting:
        uri = waiting.pop()
        if uri in seen:
            continue
        seen.add(uri)
        path = ROOT / clone_path(uri)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        if uri.endswith(".md"):
            links = (in_site(clone_path(uri), link[2]) for link in LINK.finditer(path.read_text(encoding="utf-8")))
            waiting += [link for link in links if link is not None]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point the links of a page at the site's files."""
    here = page.file.src_uri

    def pointed(link: re.Match[str]) -> str:
        if "://" in link[2]:
            return link[0]
        target = in_site(clone_path(here), link[2])
        if target is None:
            return link[1]
        return f"[{link[1]}]({posixpath.relpath(target, posixpath.dirname(here))}{link[3] or ''})"

    return LINK.sub(pointed, markdown)


def clone_path(uri: str) -> str:
    """Return the path in the clone of a file of the site."""
    return uri.removeprefix(f"{COPIES}/") if uri.startswith(f"{COPIES}/") else f"docs/{uri}"


def in_site(page: str, link: str) -> str | None:
    """Return the site's file that a link of a page of the clone means; None for a folder and for other sites."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if "://" in link or not (ROOT / path).is_file():
        return None
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIES}/{path}"


def pages(nav: Any) -> list[str]:
    """Return the pages that mkdocs.yml lists, at any depth."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages(entry)]
