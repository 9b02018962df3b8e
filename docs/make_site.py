"""Static pages of the README, of docs/*.md and of the public modules' docstrings: `make site`, which puts them into build/site."""

import re
import sys
from html import escape
from pathlib import Path

import pdoc
from pdoc.render_helpers import to_html

ROOT = Path(__file__).parent.parent
MODULES = ("fastloss", "fastloss.config", "fastloss.memory", "fastloss.integrations.transformers")
_STYLE = """
body{font:16px/1.6 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
nav{font-size:14px;border-bottom:1px solid #ddd;padding-bottom:.6rem;margin-bottom:1.5rem}nav a{margin-right:.9rem}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
td,th{padding:3px 9px;border-bottom:1px solid #e4e4e4;text-align:left}
pre{background:#f6f6f6;padding:.7rem;overflow-x:auto}code{font-size:90%}img{max-width:100%}a{color:#0072B2}
"""


def main(folder: Path) -> list[Path]:
    """Build the site; the pages that were written from Markdown."""
    api = folder / "api"
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc("fastloss", r"!fastloss\..*", *MODULES[1:], output_directory=api)
    sources = {"index": ROOT / "README.md", **{path.stem: path for path in sorted((ROOT / "docs").glob("*.md"))}}
    links = "".join(f'<a href="{name}.html">{"fastloss" if name == "index" else name}</a>' for name in sources)
    navigation = f'<nav>{links}<a href="api/fastloss.html">API</a></nav>'
    written = []
    for name, source in sources.items():
        text = source.read_text()
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        page = folder / f"{name}.html"
        page.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{escape(title.group(1) if title else name)}</title><style>{_STYLE}</style>"
            f"{navigation}{_local(to_html(text), folder)}</html>\n"
        )
        written.append(page)
    return written


def _local(html: str, folder: Path) -> str:
    """Links between Markdown files become links between pages, and pictures are brought along."""
    for picture in set(re.findall(r'src="((?:docs/)?measured/[^"]+)"', html)):
        target = folder / picture.removeprefix("docs/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / "docs" / picture.removeprefix("docs/")).read_bytes())
        html = html.replace(f'src="{picture}"', f'src="{picture.removeprefix("docs/")}"')
    html = re.sub(r'href="(?:\.\./)?README\.md(#[^"]*)?"', r'href="index.html\1"', html)
    return re.sub(r'href="(?:docs/)?([a-z-]+)\.md(#[^"]*)?"', r'href="\1.html\2"', html)


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site"
    print(f"{len(main(place))} pages and the API in {place}/index.html")
