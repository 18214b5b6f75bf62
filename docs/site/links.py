"""A hook of mkdocs: takes what pages link to outside of docs/ into the site.

Links are written so that they are right where the files are in the repository. In the site
README.md is the first page, what lies outside of docs/ keeps its path, code is on a page that shows
it, and a link to a folder is only its text.
"""

import pathlib
import posixpath
import re
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[2]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds README.md, and all that links lead to from there and from docs/."""
    found = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    for path in found:
        if path.endswith(".md"):
            found += [target for target in _targets(path) if target not in found]
        if files.get_file_from_path(_uri(path)) is None:
            files.append(_file(path, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links of the repository those of the site."""
    path = _path(page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri) or "."

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups(default="")
        target = _from(path, target)
        if (ROOT / target).is_dir():
            return text
        return f"{image}[{text}]({posixpath.relpath(_uri(target), folder)}{anchor})"

    return LINK.sub(link, markdown) if (ROOT / path).is_file() else markdown


def _targets(path: str) -> Iterator[str]:
    """The files that a page of the repository links to."""
    for _, _, target, _ in LINK.findall((ROOT / path).read_text()):
        if (ROOT / _from(path, target)).is_file():
            yield _from(path, target)


def _from(path: str, target: str) -> str:
    """Where in the repository a link of a page leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def _uri(path: str) -> str:
    """Where in the site a file of the repository is."""
    if path == "README.md":
        return "index.md"
    if posixpath.splitext(path)[1] in (".py", ""):
        return f"{path}.md"
    return path.removeprefix("docs/")


def _path(uri: str) -> str:
    """Where in the repository a page of the site is."""
    if uri == "index.md":
        return "README.md"
    return f"docs/{uri}" if (ROOT / "docs" / uri).exists() else uri


def _file(path: str, config: MkDocsConfig) -> File:
    """What the site has of a file of the repository: the file itself, or a page that shows it."""
    uri, source = _uri(path), ROOT / path
    if uri != f"{path}.md":
        return File.generated(config, uri, abs_src_path=str(source))
    language = "python" if source.suffix == ".py" else "text"
    page = f"# {path}\n\n``````{language}\n{source.read_text()}``````\n"
    return File.generated(config, uri, content=page, inclusion=InclusionLevel.NOT_IN_NAV)
