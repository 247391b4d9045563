"""Hooks of MkDocs: pages from README, from docstrings and from the files that documents link to.

on_config         entries of the navigation without a file are left out; the reference is added
on_files          README as the home page, the reference, the linked files, the vendored assets
on_page_markdown  code by name, tables of records, links into the repository
"""

from __future__ import annotations

import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from records import with_records
from source import ROOT, linked, page_of, source_page, with_code, with_links

import mistral_7b

WEB = "mistral_7b/server/web"
ASSETS = {"site/inter.woff2": f"{WEB}/vendor/inter.woff2", "site/icon.svg": f"{WEB}/icon.svg"}
EXPORT = "export{Qn as default}"  # the end of Temml's module
TITLES = {"text": "tokenizer", "training": "fine-tuning"}


def reference() -> dict[str, str]:
    """The pages of the reference: one for each room that has public names, from mistral_7b's own list of them."""
    rooms: dict[str, list[str]] = {}
    for name, home in mistral_7b._HOMES.items():
        rooms.setdefault(home.split(".")[0], []).append(f"::: mistral_7b.{home}.{name}")
    return {
        f"reference/{room}.md": f"# Reference: {TITLES.get(room, room)}\n\n" + "\n\n".join(names) + "\n"
        for room, names in rooms.items()
    }


def expanded(markdown: str) -> str:
    """A page of docs/ with the code and the records that it names."""
    return with_records(with_code(markdown))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    def there(entry: Any) -> Any:
        if isinstance(entry, str):
            return entry if entry == "index.md" or (ROOT / "docs" / entry).exists() else None
        if isinstance(entry, list):
            return [kept for one in entry if (kept := there(one)) is not None]
        ((title, inner),) = entry.items()
        kept = there(inner)
        return None if kept is None else {title: kept}

    assert config.nav is not None
    config.nav = there(config.nav)
    section = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    section += [{TITLES.get(room := page[10:-3], room).capitalize(): page} for page in reference()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    pages |= {f"docs/{f.src_uri}": expanded(f.content_string) for f in files.documentation_pages()}
    todo = list(pages)
    while todo:  # the linked files link to others
        path = todo.pop()
        for target in linked(pages[path], path) if path.endswith(".md") else ():
            if page_of(target) not in map(page_of, pages):
                pages[target] = "" if target.endswith(".png") else source_page(target)
                todo.append(target)
    for path, text in pages.items():
        if text and not path.startswith("docs/"):
            uri = page_of(path)
            files.append(File.generated(config, uri, content=with_links(text, path, uri)))
    for uri, text in reference().items():
        files.append(File.generated(config, uri, content=text))
    pictures = {page_of(path): path for path, text in pages.items() if not text}
    for uri, path in (ASSETS | pictures).items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "site/temml.js", content=temml()))
    return files


def temml() -> str:
    """The vendored Temml as a plain script: browsers load no modules into a page that was opened as a file."""
    module = (ROOT / WEB / "vendor/temml.js").read_text(encoding="utf-8")
    if EXPORT not in module:
        raise LookupError(f"{WEB}/vendor/temml.js no longer ends with {EXPORT}")
    return module.replace(EXPORT, "window.temml=Qn")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.parent is None:  # the only page of its tab, or of none
        page.meta.setdefault("hide", []).append("navigation")
    if page.file.generated_by:  # its links are right already
        return markdown
    path = f"docs/{page.file.src_uri}"
    return with_links(expanded(markdown), path, page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Tell MkDocs, which checks anchors, those of the lines of code: it does not look into code."""
    assert page.present_anchor_ids is not None
    page.present_anchor_ids |= set(re.findall(r'id="(__codelineno-0-\d+)"', html))
    return html
