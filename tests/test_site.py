"""`make site`: every page and every public name is there, and no link leads nowhere."""

import importlib.util
import re
from pathlib import Path

import pytest

import fastloss

pytest.importorskip("pdoc", reason="pdoc is not installed (pip install 'fastloss[docs]')")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("site")
    assert len(module.main(folder)) == 1 + len(list((ROOT / "docs").glob("*.md")))
    return folder


def test_pages_show_what_the_markdown_says(site: Path) -> None:
    page = (site / "index.html").read_text()
    assert "<h1" in page
    assert "<table>" in page
    assert "| ---" not in page
    for source in (ROOT / "docs").glob("*.md"):
        assert f'href="{source.stem}.html"' in page


def test_the_reference_has_every_public_name_with_its_words(site: Path) -> None:
    page = (site / "api" / "fastloss.html").read_text()
    for name in set(fastloss.__all__) - {"__version__", "config", "memory"}:
        assert f'id="{name}"' in page, name
    for words in ("label_smoothing", "class probabilities", "Raises"):
        assert words in page
    assert "Numba kernels" not in page  # what is not public is not documented
    integration = (site / "api" / "fastloss" / "integrations" / "transformers.html").read_text()
    for name in ("patch", "fuse", "FusedLoss", "masked_lm_loss"):
        assert f'id="{name}"' in integration, name


def test_links_between_pages_lead_somewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#:]+)(?:#[^"]*)?"', page.read_text()):
            if not (site / target).exists():
                assert (ROOT / target).exists() or (ROOT / "docs" / target).exists(), (page.name, target)  # a file of the repository
                assert not target.endswith(".md"), (page.name, target)
