"""For tests of pages and cards: what a browser would make of a page, and a result that says something else than it did."""

from html.parser import HTMLParser

from marlin_tools import report
from marlin_tools.report.page import markdown

STAGES = [
    {"stage": "quantize", "preset": "rtn", "ignore": ["layers.1.mlp.down_proj"]},
    {"stage": "export", "formats": ["marlin"]},
    {"stage": "evaluate", "tasks": ["ppl:demo"], "baseline": "demo", "limit": 4},
    {"stage": "verify"},
]
"""The embedded model, rounded, in two formats, with one linear left out."""

VOID = {"meta", "br", "link", "img", "hr"}


class Reader(HTMLParser):
    """Complains about tags that are not closed, and collects what a browser would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [
            value for name, value in attrs if name in {"src", "srcset", "data", "poster"} or (tag, name) == ("link", "href")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def card(directory):
    return report.pages(directory)[0]["README.md"]


def changed(result, **manifest):
    return type(result)(**{**vars(result), "manifest": {**result.manifest, **manifest}})


def card_of(result):
    return markdown("card.md.j2", result=result, steps=[])
