"""The pages: every block of Python runs, every relative link, anchor and named file is there. Needs no Sphinx."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

import urm_kernels
from urm_kernels import evaluation, factorize, testing

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRACT", "CONTRIBUTING", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").glob("*.md"))

FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,}|:{3,})(.*)$")
PYTHON = re.compile(r"\bi?py(thon|con)?\d?\b|code-cell", re.IGNORECASE)
NO_TEST = re.compile(r"<!--\s*no-test\b:?\s*(.*?)\s*-->")
LINK = re.compile(r"\]\(\s*<?([^)\s>]*)>?(?:\s+[\"'][^)]*)?\)|^ {0,3}\[[^\]]+\]:\s+(\S+)|\b(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6} +(.*?)(?: +#+)?$")
CODE_SPAN = re.compile(r"(`+)(.+?)\1")
# Where a code span names a file of the project; braces, stars and arguments are not names of one file.
FILE = re.compile(
    r"(?:bench|csrc|docs|python_tests|requirements|urm_kernels)/[\w./-]*\w\.(?:cc|h|json|md|png|py|sh|svg|txt)"
)


def split(text):
    """(prose with code blocks blanked out, [(language, first line, lines, why not tested)]), line numbers kept."""
    prose, blocks, fence, why_not = [], [], None, None
    for number, line in enumerate(text.splitlines(), 1):
        match = FENCE.match(line)
        if fence is None and match and match[1][0] != ":":
            fence = match[1]
            blocks.append((match[2].strip(), number + 1, [], why_not))
        elif fence is not None and match and match[1].startswith(fence) and not match[2].strip():
            fence, why_not = None, None
        elif fence is not None:
            blocks[-1][2].append(line)
        else:
            prose.append(line)
            if marked := NO_TEST.search(line):
                why_not = marked[1]
            elif line.strip():
                why_not = None
            continue
        prose.append("")
    assert fence is None, f"a block that begins with {fence} does not end"
    return prose, blocks


def script(text):
    """The page's Python as one program whose lines have the page's numbers; empty where there is none to run."""
    lines = [""] * len(text.splitlines())
    for language, first, block, why_not in split(text)[1]:
        if not PYTHON.search(language):
            continue
        if why_not is not None:
            assert why_not, f"line {first - 1}: no-test needs its reason: <!-- no-test: reason -->"
            continue
        lines[first - 1 : first - 1 + len(block)] = block
    return "\n".join(lines) if any(lines) else ""


def run(page, folder):
    """Runs a page in a process and a folder of its own, as a reader would who pastes block after block."""
    program = folder / page.name.replace(".md", ".py")
    program.write_text(script(page.read_text("utf-8")), encoding="utf-8")
    environment = {**os.environ, "MPLBACKEND": "agg"}
    return subprocess.run(
        [sys.executable, program.name], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def slugs(page):
    """Anchors of a page's headings, as GitHub and MyST make them, and those that it sets itself."""
    found, prose = [], split(page.read_text("utf-8"))[0]
    for line in prose:
        if match := HEADING.match(line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).replace("`", "")
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(slug if slug not in found else f"{slug}-{sum(s == slug for s in found)}")
        found += re.findall(r"^\(([\w-]+)\)=$", line)
    return found


def broken_links(page, root=ROOT):
    """Relative links and anchors of a page that lead nowhere."""
    broken = []
    for number, line in enumerate(split(page.read_text("utf-8"))[0], 1):
        for match in LINK.finditer(CODE_SPAN.sub("", line)):
            target = match[1] or match[2] or match[3] or ""
            if re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE):
                continue  # external; `make docs-links` asks for those
            path, _, anchor = unquote(target).partition("#")
            there = page if not path else page.parent / path
            if not target or path.startswith("/") or not there.resolve().is_relative_to(root) or not there.exists():
                broken.append(f"{page.name}:{number}: {target or '(empty)'}: no such file")
            elif anchor and (there.suffix != ".md" or anchor not in slugs(there)):
                broken.append(f"{page.name}:{number}: {target}: no such heading")
    return broken


def missing_files(page):
    """Files of the project that a page names in code spans and that do not exist."""
    named = [span[2] for line in split(page.read_text("utf-8"))[0] for span in CODE_SPAN.finditer(line)]
    return [f"{page.name}: {name}" for name in named if FILE.fullmatch(name) and not (ROOT / name).exists()]


def pages_with_python():
    return [page for page in PAGES if script(page.read_text("utf-8"))]


@pytest.mark.parametrize("page", pages_with_python(), ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path):
    done = run(page, tmp_path)
    assert done.returncode == 0, f"{page.name}: line numbers are the page's\n{done.stderr}"


def test_the_pages_that_teach_have_python():
    assert {"README.md", "quickstart.md"} <= {page.name for page in pages_with_python()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not broken_links(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_in_code_spans_name_files(page):
    assert not missing_files(page)


@pytest.mark.parametrize("module", [urm_kernels, factorize, evaluation, testing], ids=lambda module: module.__name__)
def test_every_name_of_the_reference_has_a_docstring(module):
    names = getattr(module, "__all__", [n for n, value in vars(module).items() if owns(module, n, value)])
    bare = [name for name in names if callable(getattr(module, name)) and not getattr(module, name).__doc__]
    assert not bare


def owns(module, name, value):
    return not name.startswith("_") and getattr(value, "__module__", None) == module.__name__


# What the checks above must not miss.


def page_of(folder, text, name="page.md"):
    page = folder / name
    page.write_text(text, encoding="utf-8")
    return page


def test_a_failing_block_is_told_by_the_pages_line(tmp_path):
    page = page_of(tmp_path, "# A\n\n```python\na = 1\n```\n\ntext\n\n```{code-cell} python\nassert a == 2\n```\n")
    done = run(page, tmp_path)
    assert done.returncode != 0
    assert 'page.py", line 10' in done.stderr


def test_only_python_runs_and_only_what_gives_a_reason_does_not(tmp_path):
    text = "```sh\nexit 1\n```\n<!-- no-test: needs a GPU -->\n\n```python\n1 / 0\n```\n\n```python\na = 1\n```\n"
    assert script(text).split() == ["a", "=", "1"]
    with pytest.raises(AssertionError, match="line 3: no-test needs its reason"):
        script("text\n<!-- no-test -->\n```python\n1 / 0\n```\n")
    with pytest.raises(AssertionError, match="does not end"):
        script("```python\na = 1\n")


@pytest.mark.parametrize(
    ("link", "broken"),
    [
        ("[a](page.md)", False),
        ("[a](page.md#two-words-or-3)", False),
        ("[a](#two-words-or-3)", False),
        ("[a](https://example.org/none)", False),
        ("`[a](none.md)`", False),
        ("```\n[a](none.md)\n```", False),
        ("[a](none.md)", True),
        ("[](none.md 'title')", True),
        ("![a](none.png)", True),
        ("[a](#two)", True),
        ("[a](page.md#two)", True),
        ("[a]()", True),
        ("[a](/page.md)", True),
        ("[a](../../../page.md)", True),
        ("[a]: none.md", True),
        ('<img src="none.png">', True),
        ("```\n# in code\n```\n[a](#in-code)", True),
    ],
)
def test_what_a_broken_link_is(tmp_path, link, broken):
    page = page_of(tmp_path, f"# Two `words`, or 3\n\n{link}\n")
    assert bool(broken_links(page, tmp_path)) == broken
