"""The Python blocks of a page of the documents, run as a reader pastes them."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def run_sections(page, *titles, **names):
    """What stands under the headings, with names that a reader has; all names after."""
    path = DOCS / page
    sections = dict(
        re.findall(r"^## (.*)\n((?:(?!^## ).*\n)*)", path.read_text(), re.M)
    )
    for title in titles:
        for block in re.findall(r"```python\n(.*?)```", sections[title], re.DOTALL):
            exec(compile(block, str(path), "exec"), names)
    return names
