"""What `mkdocs.yml` needs beside mkdocs: pages link to files of the repository, docstrings have Hugging Face's markup.

A page links to a file outside `docs/` as it stands in the repository, `](../benchmarks/results/speed.md)`, so that the
link works there too. The site holds a copy of each file that is linked so; a link to none fails `--strict`.
"""

from __future__ import annotations

import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Put the files that pages link to outside `docs/` beside the pages."""
    pages = [file.content_string for file in files.documentation_pages()]
    for path in sorted({path for page in pages for path in OUTSIDE.findall(page)}):
        if (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, **_) -> str:
    """Point the links to where the copies are."""
    return OUTSIDE.sub(r"](\1", markdown)


class HubDocstrings(griffe.Extension):
    """Makes Google's markup of that of our docstrings, which transformers and trl share."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = google_style(obj.docstring.value)


def google_style(text: str) -> str:
    """A docstring as griffe's parser reads it.

    Args:
        text: With links such as "[`~transformers.Trainer`]", parameters such as "alpha (`float`, *optional*): Text"
            and several of them in one entry, "a, b: Text".

    Returns:
        The same without the brackets, with the types left to the signature, which has them too, and with an entry
        for each parameter.
    """
    # Parameters first, because their types have links.
    text = re.sub(r"^( +\w+) \([`\[].*\): ", r"\1: ", text, flags=re.MULTILINE)
    text = re.sub(r"\[`~?([\w.]+)`\]", r"`\1`", text)
    several = re.compile(r"^( +)([a-z_]+(?:, [a-z_]+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)
    return several.sub(lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")), text)
